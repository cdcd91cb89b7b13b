// The panel below the graph: one node, or one attention head.

const details = (() => {
  const host = byId("details");

  function update() {
    const { selected } = state;
    const { activeElement } = document;
    const held = host.contains(activeElement) ? activeElement.dataset.key : null;
    if (selected?.node) fill(host, nodeDetails(selected.node));
    else if (selected?.head) fill(host, headDetails(selected.head));
    else fill(host, overview());
    // Who pressed a button that was drawn anew is still on it.
    if (held) host.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
  }

  const heading = (title, place, code, meaning) => [
    h("div", { class: "bar" },
      h("h2", {}, title),
      h("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: () => select(null) },
        "✕")),
    h("p", { class: "place" }, place, code ? h("code", {}, code) : null),
    h("p", { class: "how" }, meaning),
  ];

  const nodeButton = (node, ...more) =>
    h("button", { type: "button", class: "row", onclick: () => go({ node }) },
      h("span", { class: "chip" }, nodeLabel(node)), ...more);

  // Select from the panel and leave the focus in it, where the reader is.
  function go(selection) {
    select(selection);
    host.focus({ preventScroll: true });
  }

  function overview() {
    const best = d3.sort(measured, (node) => -node.effect).slice(0, 8);
    return [
      h("h2", {}, "Nothing selected"),
      h("p", { class: "how" }, "Click a box or a head in the graph. These nodes matter most:"),
      h("div", { class: "rows" }, best.map((node) => nodeButton(node,
        h("span", { class: "grow" }, `${nodeName(node)}, ${nodePlace(node)}`),
        h("span", { class: "value" }, signed(node.effect))))),
    ];
  }

  function nodeDetails(node) {
    const code = node.kind === "token" ? `token ${node.index}` : `${node.site}[${node.index}]`;
    const parts = heading(nodeName(node), nodePlace(node), code, nodeMeaning(node));
    if (node.note) parts.push(h("p", { class: "note" }, visible(node.note, false)));
    if (node.effect !== undefined) parts.push(effectOf(node));
    const head = headOf(node);
    if (head && node.head !== undefined) {
      parts.push(h("p", {}, h("button", { type: "button", class: "wide", onclick: () => go({ head }) },
        `Where head ${head.head} looks`)));
    }
    parts.push(connections("Reads from", node.ins, "source"));
    parts.push(connections("Writes to", node.outs, "target"));
    if (node.histograms) parts.push(...activationsOf(node));
    const channel = channels.of(node);
    if (channel) {
      parts.push(h("p", {}, h("button", { type: "button", class: "wide", onclick: () => channels.show(channel) },
        `Tokens and positions on channel ${channel.channel}`)));
    }
    return parts;
  }

  function effectOf(node) {
    const { loss } = data.losses.circuit;
    const verb = node.effect < 0 ? "falls" : "rises";
    const rank = data.ranking === "mask score" && node.score !== undefined
      ? `Mask score ${plain(node.score)}, ` : "";
    return h("div", { class: "effect" },
      h("span", { class: `swatch ${node.effect < 0 ? "helps" : "harms"}`, "--t": effectStrength(node.effect).toFixed(3) }),
      h("div", {},
        h("b", {}, `${signed(node.effect, 3)} nats`),
        h("p", {}, `Without this node, fixed at its mean, the circuit's loss ${verb} from ${loss.toFixed(3)} `
          + `to ${Math.max(0, loss + node.effect).toFixed(3)}. ${rank}rank ${node.rank + 1} of ${measured.length}.`)));
  }

  function connections(title, list, end) {
    if (!list.length) return null;
    const order = d3.sort(list, (link) => -Math.abs(link.weight));
    const rows = (some) => some.map((link) => {
      const node = link[end];
      const residual = link.kind === "residual";
      return nodeButton(node,
        h("span", { class: "grow" }, residual ? "same channel" : nodePlace(node)),
        residual ? null : h("span", { class: `meter ${link.weight < 0 ? "negative" : "positive"}`, "--t": (Math.abs(link.weight) / strongestWeight).toFixed(3) }),
        h("span", { class: "value" }, residual ? "" : signed(link.weight)));
    });
    return h("div", {},
      h("h3", {}, `${title} `, h("span", { class: "faint" }, String(list.length))),
      h("div", { class: "rows" }, rows(order.slice(0, 6))),
      order.length > 6
        ? h("details", {}, h("summary", {}, `${order.length - 6} more`),
          h("div", { class: "rows" }, rows(order.slice(6))))
        : null);
  }

  const SAMPLES = [["task", "Task prompts"], ["text", "Pretraining text"]];

  function activationsOf(node) {
    const { sample } = state;
    const { top, bottom } = node.examples[sample];
    const beside = (value) => value - node.mean;
    const shown = [...top, ...bottom].flatMap(([, , , values]) => values);
    const largest = d3.max(shown, (value) => Math.abs(beside(value)));
    const list = (title, examples, none) => [
      h("h3", {}, title),
      examples.length
        ? h("ol", { class: "examples" }, examples.map(([sequence, start, at, values]) => {
          const ids = data.sequences[sample][sequence].slice(start, start + values.length);
          return h("li", {},
            h("span", { class: "value" }, plain(values[at - start])),
            colouredTokens(ids, values, largest, { at: at - start, start, shade: beside }));
        }))
        : h("p", { class: "faint" }, none),
    ];
    return [
      h("h3", {}, "Activation"),
      segmented("Which text", SAMPLES, sample, (value) => { state.sample = value; update(); }),
      histogramChart(node, sample),
      h("p", { class: "note" },
        `The line is the node's mean, ${plain(node.mean)}, at which it stands when ablated; orange `
        + `is above it, blue below. Zeros, ${percent(node.histograms[sample].zero)} of the tokens, `
        + "are left out; heights are square roots. "
        + (sample === "task" ? "Measured with the circuit alone." : "Measured in the whole model.")),
      ...list("Highest", top, "Never above its mean here."),
      ...list("Lowest", bottom, "Never below its mean here, but for zeros."),
    ];
  }

  // Query token per prompt that the reader chose; the last one, which answers, until then.
  const chosenQuery = new Map();

  function headDetails(head) {
    const { prompts } = data.heads;
    const ids = prompts[state.prompt];
    const flat = head[state.run][state.prompt];
    const query = chosenQuery.get(state.prompt) ?? ids.length - 1;
    const weights = patternRow(flat, query);
    const choose = (token) => { chosenQuery.set(state.prompt, token); update(); };
    const most = d3.maxIndex(weights);
    const rest = 1 - d3.sum(weights);
    return [
      ...heading(`Head ${head.head}`, `layer ${head.layer}, attention`, "",
        "Every token asks with its queries which tokens before it to look at, and brings their "
        + "values to its own place."),
      h("div", { class: "rows" }, members(head).map((node) => nodeButton(node,
        h("span", { class: "grow" }, nodeName(node)),
        h("span", { class: "value" }, signed(node.effect))))),
      h("h3", {}, "Where it looks"),
      segmented("Prompt", prompts.map((_, i) => [i, PROMPT_NAMES[i] ?? `Another ${i - 1}`]), state.prompt,
        (value) => { state.prompt = value; update(); }),
      segmented("Run", [["circuit", "Circuit alone"], ["model", "Whole model"]], state.run,
        (value) => { state.run = value; update(); }),
      h("p", { class: "how" }, "From ", h("b", {}, tokenLabel(ids[query], 20)),
        query === ids.length - 1 ? ", the last token, it looks most at " : ", it looks most at ",
        h("b", {}, tokenLabel(ids[most], 20)), ` (${weights[most].toFixed(2)}). `,
        rest > 0.02 ? `${rest.toFixed(2)} goes to no token at all (the sink). ` : "",
        "Click a token to look from there."),
      colouredTokens(ids, ids.map((_, i) => weights[i] ?? 0), Math.max(0.05, d3.max(weights)),
        { at: query, onpick: choose }),
      patternChart(ids, flat, query, choose),
      h("p", { class: "note" }, "One row per token that looks, one column per token looked at; darker is "
        + "more (a square root). The frame is the row chosen above."),
    ];
  }

  const PROMPT_NAMES = ["Example", "Counterfactual"];

  return { update };
})();
