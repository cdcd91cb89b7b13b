// The panel below the graph: one node, or one attention head.

const details = (() => {
  const host = byId("details");

  function update() {
    const { selected } = state;
    const { activeElement } = document;
    const held = host.contains(activeElement) ? activeElement.dataset.key : null;
    const { ids } = pairIds(state.pair)[state.side];
    if (selected?.node) fill(host, nodeDetails(selected.node));
    else if (selected?.head) fill(host, headDetails(selected.head));
    else if (selected?.link) fill(host, linkDetails(selected.link));
    else if (selected?.group) fill(host, groupDetails(selected.group));
    else if (selected?.token < ids.length) fill(host, tokenDetails(selected.token, ids));
    else fill(host, overview());
    // Who pressed a button that was drawn anew is still on it.
    if (held) host.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
  }

  const heading = (title, place, code, meaning, ...buttons) => [
    h("div", { class: "bar" },
      h("h2", {}, title),
      ...buttons,
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
    const parts = heading(nodeName(node), nodePlace(node), code, nodeMeaning(node), notes.button(node));
    if (node.note) parts.push(h("p", { class: "note" }, visible(node.note, false)));
    if (node.effect !== undefined) parts.push(effectOf(node));
    const head = headOf(node);
    if (head && node.head !== undefined) {
      parts.push(h("p", {}, h("button", { type: "button", class: "wide", onclick: () => go({ head }) },
        `Where head ${head.head} looks`)));
    }
    parts.push(connections("Reads from", node.ins, "source"));
    parts.push(connections("Writes to", node.outs, "target"));
    if (node.histograms) parts.push(...channelAttention(node), ...onTokens(node), ...onPair(node), ...activationsOf(node));
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
    const score = node.score === undefined ? "" : ` Its mask score is ${plain(node.score)}.`;
    return h("div", { class: "effect" },
      h("span", { class: `swatch ${node.effect < 0 ? "helps" : "harms"}`, "--t": effectStrength(node.effect).toFixed(3) }),
      h("div", {},
        h("b", {}, `${signed(node.effect, 3)} nats`),
        h("p", {}, `Without this node, fixed at its mean, the circuit's loss ${verb} from ${loss.toFixed(3)} `
          + `to ${Math.max(0, loss + node.effect).toFixed(3)}. By effect it is ${node.rank + 1} of ${measured.length}.${score}`)));
  }

  // What the circuit does at one token of the prompt.
  function tokenDetails(at, ids) {
    const order = d3.sort(measured, (node) => -Math.abs(byTokens.effectsOf(node)[at]));
    return [
      ...heading(`Token ${tokenLabel(ids[at], 24)}`, `${byTokens.where(at)}, of the prompt`, "",
        "What the right answer's logit, less the other's, loses in the circuit when a node is fixed at its "
        + "mean at this token alone."),
      sideButtons(),
      h("div", { class: "rows" }, order.slice(0, 12).map((node) => nodeButton(node,
        h("span", { class: "grow" }, `${nodeName(node)}, ${nodePlace(node)}`),
        h("span", { class: "value" }, signed(byTokens.effectsOf(node)[at]))))),
    ];
  }

  function groupDetails(name) {
    return [
      ...heading(clip(visible(name, false), 60), "a group of yours", "",
        "The effect is that of each node alone; a group's was not measured."),
      h("div", { class: "rows" }, inGroup(name).map((node) => nodeButton(node,
        h("span", { class: "grow" }, `${nodeName(node)}, ${nodePlace(node)}`),
        h("span", { class: "value" }, node.effect === undefined ? "" : signed(node.effect))))),
    ];
  }

  // A weight: its ends, and what the loss becomes without it.
  function linkDetails(link) {
    const { source, target, weight, effect, kind } = link;
    const name = { weight: "Weight", residual: "Same channel",
      embed: source.kind === "token" ? "Embedding" : "Unembedding" }[kind];
    const { loss } = data.losses.circuit;
    const unmeasured = {
      weight: "Its effect was not measured: only those of the strongest weights were.",
      embed: "It is taken away together with its channel or its token, not alone.",
      residual: "No weight: what the first writes to the channel, the second reads there.",
    }[kind];
    return [
      ...heading(kind === "residual" ? name : `${name} ${signed(weight, 3)}`,
        `${nodeName(source)} → ${nodeName(target)}`, "", ""),
      effect === null
        ? h("p", { class: "effect" }, unmeasured)
        : h("div", { class: "effect" },
          h("span", { class: `swatch ${effect < 0 ? "helps" : "harms"}`, "--t": effectStrength(effect).toFixed(3) }),
          h("div", {}, h("b", {}, `${signed(effect, 3)} nats`),
            h("p", {}, "Without this weight, with what it carries fixed at its mean, the circuit's loss "
              + `${effect < 0 ? "falls" : "rises"} from ${loss.toFixed(3)} to `
              + `${Math.max(0, loss + effect).toFixed(3)}.`))),
      h("h3", {}, "Its ends"),
      h("div", { class: "rows" }, [source, target].map((node) => nodeButton(node,
        h("span", { class: "grow" }, `${nodeName(node)}, ${nodePlace(node)}`),
        h("span", { class: "value" }, node.effect === undefined ? "" : signed(node.effect))))),
    ];
  }

  function connections(title, list, end) {
    if (!list.length) return null;
    const order = d3.sort(list, (link) => -Math.abs(link.weight));
    const rows = (some) => some.map((link) => {
      const node = link[end];
      const residual = link.kind === "residual";
      return h("div", { class: "connection" }, nodeButton(node,
        h("span", { class: "grow" }, residual ? "same channel" : nodePlace(node)),
        residual ? null : h("span", { class: `meter ${link.weight < 0 ? "negative" : "positive"}`, "--t": (Math.abs(link.weight) / strongestWeight).toFixed(3) }),
        h("span", { class: "value" }, residual ? "" : signed(link.weight))),
      residual ? null : h("button", { type: "button", class: "quiet", title: "About this weight",
        "aria-label": `Weight ${signed(link.weight)}, ${nodeName(link.source)} to ${nodeName(link.target)}`,
        onclick: () => go({ link }) }, link.effect === null ? "…" : signed(link.effect, 3)));
    });
    return h("div", {},
      h("h3", {}, `${title} `, h("span", { class: "faint" }, String(list.length)),
        h("span", { class: "faint right" }, "weight · loss without it")),
      h("div", { class: "rows" }, rows(order.slice(0, 6))),
      order.length > 6
        ? h("details", {}, h("summary", {}, `${order.length - 6} more`),
          h("div", { class: "rows" }, rows(order.slice(6))))
        : null);
  }

  function headDetails(head) {
    const { ids } = pairIds(state.pair)[state.side];
    const flat = head[state.run][2 * state.pair + state.side];
    const query = queryOf(ids);
    const weights = patternRow(flat, query);
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
      sideButtons(),
      segmented("Run", [["circuit", "Circuit alone"], ["model", "Whole model"]], state.run,
        (value) => { state.run = value; refresh(); }),
      h("p", { class: "how" }, "From ", h("b", {}, tokenLabel(ids[query], 20)),
        query === ids.length - 1 ? ", the last token, it looks most at " : ", it looks most at ",
        h("b", {}, tokenLabel(ids[most], 20)), ` (${weights[most].toFixed(2)}). `,
        rest > 0.02 ? `${rest.toFixed(2)} goes to no token at all (the sink). ` : "",
        "Click a token to look from there."),
      colouredTokens(ids, ids.map((_, i) => weights[i] ?? 0), Math.max(0.05, d3.max(weights)),
        { at: query, onpick: chooseQuery }),
      patternChart(ids, flat, query, chooseQuery),
      h("p", { class: "note" }, "One row per token that looks, one column per token looked at; darker is "
        + "more (a square root). The frame is the row chosen above."),
    ];
  }

  return { update };
})();
