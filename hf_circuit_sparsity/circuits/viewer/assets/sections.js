// Everything around the graph: title, losses, legend, curve, channels, words.

function showTitle() {
  byId("task").textContent = clip(visible(data.task, false), 80);
  const { nodes: kept, modelNodes, edges } = data.size;
  const share = percent(kept / modelNodes);
  byId("lead").replaceChildren(
    data.description ? `${clip(data.description, 300)} ` : "",
    `Of the model's ${modelNodes.toLocaleString("en")} nodes, ${kept} (${share}) with `
    + `${count(edges, "weight")} between them do it.`
    + (data.size.cutEdges ? ` ${count(data.size.cutEdges, "more weight")} between them were dropped.` : ""),
  );
}

// Token of a prompt's last that looks; the last one, which answers, until another is chosen.
const queryOf = (ids) => Math.min(state.query ?? ids.length - 1, ids.length - 1);
function chooseQuery(token) {
  state.query = token;
  refresh();
}

// What a box of the graph is; by token, also which prompt.
function showView() {
  fill(byId("view"),
    segmented("View", [["nodes", "Nodes"], ["tokens", "By token position"]], state.view, (view) => {
      state.view = view;
      drawGraph();
      details.update();
    }),
    state.view === "tokens" ? sideButtons() : null);
}

const sideButtons = () => segmented("Prompt", CLASSES.map((name, i) => [i, name]), state.side,
  (side) => { state.side = side; refresh(); });

function showExample() {
  const [here, there] = data.pairs[state.pair];
  const differ = (side, other) => side.ids.map((id, i) =>
    (side.ids.length === other.ids.length ? id !== other.ids[i] : !other.ids.includes(id)));
  const line = (name, side, other) => {
    const marks = differ(side, other);
    // Long prompts: what differs is mostly near the end, and the answer always is.
    const from = Math.max(0, Math.min(marks.indexOf(true) - 12, side.ids.length - 64));
    return h("div", { class: "prompt" },
      h("span", { class: "faint" }, name),
      h("p", { class: "tokens code" },
        from > 0 ? "… " : "",
        side.ids.slice(from).map((id, i) => h("span", { class: marks[from + i] ? "differs" : "" },
          clip(visible(tokenText(id), false), 24).replaceAll("⏎", "⏎\n"))),
        h("span", { class: "arrow" }, " → "),
        h("b", { class: "answer" }, tokenLabel(side.target)),
        h("span", { class: "faint" }, `  not ${tokenLabel(side.other)}`)),
      predicted("Circuit alone", "circuit", side),
      predicted("Whole model", "model", side));
  };
  const choose = (pair) => { Object.assign(state, { pair, query: null }); refresh(); };
  fill(byId("example"),
    h("div", { class: "bar" }, h("h2", {}, "The task"),
      data.pairs.length > 1 ? segmented("Pair of prompts",
        data.pairs.map((_, i) => [i, `Pair ${i + 1}`]), state.pair, choose) : null),
    h("div", { class: "prompts" },
      line(state.pair ? "Class 1" : "Class 1, the circuit's example", here, there),
      line("Class 2, its counterfactual", there, here)),
  );
}

// The likeliest next tokens of all, and the two answers among them.
function predicted(name, run, side) {
  const answers = side.answers[run];
  return h("p", { class: "note predicted" }, `${name}: `,
    side.predicted[run].slice(0, 3).flatMap(([token, probability]) => [
      h("span", { class: `chip${token === side.target ? " right-answer" : ""}` }, tokenLabel(token)),
      ` ${percent(probability)} `]),
    side.predicted[run].slice(0, 3).some(([token]) => token === side.target) ? ""
      : `· right answer ${percent(answers[0])}`);
}

function showLosses() {
  const { model, circuit, without } = data.losses;
  const guess = Math.LN2;
  const most = Math.max(1, guess, model.loss, circuit.loss, without.loss) * 1.05;
  const row = (name, run, kind) => h("div", { class: `loss ${kind}` },
    h("span", {}, name),
    h("span", { class: "track", "--t": Math.min(1, run.loss / most).toFixed(4), "--guess": (guess / most).toFixed(4) },
      h("span", { class: "fill" }), h("span", { class: "guess" })),
    h("span", { class: "value" }, run.loss.toFixed(3)),
    h("span", { class: "faint value" }, percent(run.accuracy)));
  byId("losses").append(
    h("h2", {}, "Before and after"),
    row("Whole model", model, ""),
    row("Circuit alone", circuit, "kept"),
    row("Model without it", without, "removed"),
    h("p", { class: "note" }, `Task loss in nats and accuracy on ${data.samples.prompts} held-out prompts. `
      + "The model's logits are calibrated as the circuit's are. The tick is guessing, 0.69."),
  );
}

// What `Circuit.verify` measured, where it did.
function showChecks() {
  const checks = Object.entries(data.checks);
  byId("verdict").append(h("strong", {}, "May it be believed? "), visible(data.verdict, false));
  if (!checks.length) return;
  const bounded = checks.filter(([, check]) => check.threshold !== undefined);
  const show = (value) => (value === undefined ? "" : value.toFixed(3));
  const interval = (low, high) => (low === undefined ? "" : ` (${show(low)} to ${show(high)})`);
  const cells = (tag, list) => list.map((text, i) => h(tag, { class: i ? "value" : "" }, text));
  byId("losses").append(h("details", { class: "checks" },
    h("summary", {}, `${bounded.filter(([, check]) => check.passed).length} of `
      + `${count(bounded.length, "check")} passed`),
    h("table", {},
      h("thead", {}, h("tr", {}, cells("th", ["Check", "Circuit", "Random", "Wanted", ""]))),
      h("tbody", {}, checks.map(([name, check]) => h("tr", {}, cells("td", [
        clip(visible(name, false), 40), show(check.value) + interval(check.low, check.high),
        show(check.control) + interval(check.control_low, check.control_high),
        check.threshold === undefined ? "" : `${check.at_least ? "≥" : "≤"} ${plain(check.threshold)}`,
        check.threshold === undefined ? "–" : check.passed ? "✓" : "✗",
      ]))))),
    h("p", { class: "note" }, "Random: circuits of equal size, drawn at random: "
      + "their mean and its 95 % interval.")));
}

function showLegend() {
  const item = (mark, text) => h("span", { class: "item" }, mark, text);
  const line = (kind) => h("i", { class: `line ${kind}` });
  const best = d3.min(measured, (node) => node.effect);
  if (state.view === "tokens") return showTokenLegend(item, line);
  byId("graph-how").textContent = "Read from "
    + `${graph.isVertical() ? "top to bottom" : "left to right"}: tokens excite channels of the `
    + "residual stream, a few weights carry that on through heads and neurons, and what is written "
    + "last decides between the answers. Choose a box to see what it does.";
  fill(byId("legend"),
    item(line("positive"), "positive weight"),
    item(line("negative"), "negative"),
    item(line("embed"), "embedding, unembedding"),
    links.some((link) => link.kind === "residual") ? item(line("residual"), "same channel") : null,
    item(h("i", { class: "gradient harms" }), `loss without the node: 0 to ${signed(largestEffect)}`),
    best < -0.005 ? item(h("i", { class: "gradient helps" }), `down to ${signed(best)}`) : null,
  );
}

function showTokenLegend(item, line) {
  const most = byTokens.largest();
  byId("graph-how").textContent = byTokens.how();
  fill(byId("legend"),
    item(line("positive"), "positive weight"),
    item(line("negative"), "negative"),
    item(line("embed"), "embedding, unembedding"),
    item(line("attention"), "queries and keys: where the head looks"),
    item(line("residual"), "same channel"),
    item(h("i", { class: "gradient harms" }), `what the answer loses without it there: 0 to ${most.toFixed(2)} logits`),
    item(h("i", { class: "gradient helps" }), "what it gains"),
  );
}

const curveView = (() => {
  let move = () => {};

  function draw() {
    const host = byId("curve");
    const width = Math.max(300, Math.min(1320, host.clientWidth));
    const [height, left, right, top, bottom] = [width < 560 ? 220 : 240, 44, 16, 12, 38];
    const picture = svg(width, height, "Task loss against circuit size").attr("width", width)
      .attr("height", height);
    // Linear up to the circuit's size, then logarithmic up to the whole model.
    const x = d3.scaleSymlog([0, d3.max(curve.sizes)], [left, width - right])
      .constant(Math.max(2, measured.length / 2));
    const all = [...curve.losses, ...(curve.byScore ?? []), Math.LN2];
    // What is far worse than guessing is drawn at the upper edge.
    const y = d3.scaleLinear([0, Math.min(2, d3.max(all) * 1.05)], [height - bottom, top]).nice(5)
      .clamp(true);
    const line = d3.line((_, i) => x(curve.sizes[i]), (loss) => y(loss));
    const ticks = [...new Set([0, measured.length, ...[10, 30, 100, 300, 1000, 3000, 1e4, 1e5]
      .filter((size) => size > measured.length * 1.6 && size < d3.max(curve.sizes) * 0.6),
    d3.max(curve.sizes)])];
    picture.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`)
      .call(axis(x, d3.axisBottom).tickValues(ticks).tickFormat(d3.format(",")));
    picture.append("g").attr("class", "axis grid").attr("transform", `translate(${left},0)`)
      .call(d3.axisLeft(y).ticks(5).tickSize(left + right - width).tickPadding(6));
    picture.append("text").attr("class", "note").attr("text-anchor", "middle")
      .attr("x", (left + width - right) / 2).attr("y", height - 4).text("nodes kept");
    picture.append("path").attr("class", "guess").attr("d", `M${left},${y(Math.LN2)}H${width - right}`);
    picture.append("text").attr("class", "note").attr("x", width - right).attr("text-anchor", "end")
      .attr("y", y(Math.LN2) - 5).text("guessing");
    if (curve.byScore) {
      picture.append("path").attr("class", "curve other")
        .attr("d", d3.line((_, i) => x(curve.byScoreSizes[i]), y)(curve.byScore));
    }
    picture.append("path").attr("class", "curve").attr("d", line(curve.losses));
    picture.append("g").selectAll("circle").data(curve.losses).join("circle").attr("class", "dot")
      .attr("r", 3).attr("cx", (_, i) => x(curve.sizes[i])).attr("cy", y);
    const mark = picture.append("g").attr("class", "here");
    mark.append("path");
    mark.append("circle").attr("r", 6);
    picture.append("rect").attr("class", "catch").attr("width", width).attr("height", height)
      .on("pointermove", (event) => {
        const i = nearest(event);
        const other = curve.byScoreSizes?.indexOf(curve.sizes[i]) ?? -1;
        tip.show(event, [count(curve.sizes[i], "node"), `loss ${curve.losses[i].toFixed(3)}`,
          ...(other >= 0 ? [`by score alone ${curve.byScore[other].toFixed(3)}`] : [])]);
      })
      .on("pointerleave", tip.hide)
      .on("click", (event) => setSize(Math.min(measured.length, curve.sizes[nearest(event)])));
    const nearest = (event) => {
      const at = d3.pointer(event, picture.node())[0];
      return d3.minIndex(curve.sizes, (size) => Math.abs(x(size) - at));
    };
    move = () => {
      mark.select("path").attr("d", `M${x(state.size)},${top}V${height - bottom}`);
      mark.select("circle").attr("cx", x(state.size)).attr("cy", y(lossAt(state.size)));
    };
    move();
    byId("curve-how").textContent = "Loss when only so many nodes are kept, the largest ablation effect "
      + "first: up to the mark those of this circuit, after it others of the model are added. "
      + (curve.byScore ? "Dashed: the model's best nodes by mask score alone, before pruning "
        + "dropped those that turned out not to be needed. " : "")
      + "The slider below the graph moves the mark.";
    host.replaceChildren(picture.node());
  }

  return { draw, update: () => move() };
})();

const channels = (() => {
  const list = data.channels;
  let shown = list[0];

  const worth = (channel) => d3.max(measured, (node) =>
    (["act_in", "resid_delta"].includes(node.kind) && node.index === channel.channel ? node.effect : -Infinity));

  function of(node) {
    if (!["act_in", "resid_delta"].includes(node.kind)) return null;
    return list.find((entry) => entry.channel === node.index) ?? null;
  }

  function show(channel) {
    shown = channel;
    draw();
    url.save();
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    byId("channels-title").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  }

  function table(title, weights, none) {
    const part = h("div", { class: "table" }, h("h3", {}, title));
    if (!weights) {
      part.append(h("p", { class: "faint" }, none));
      return part;
    }
    const { positive, negative, nonzeros, tokens } = weights;
    const most = d3.max([...positive, ...negative], ([, weight]) => Math.abs(weight));
    const rows = (pairs) => h("ul", { class: "rows" }, pairs.map(([token, weight]) => h("li", { class: "row" },
      h("span", { class: "chip" }, tokenLabel(token, 16)),
      h("span", { class: `meter grow ${weight < 0 ? "negative" : "positive"}`, "--t": (Math.abs(weight) / most).toFixed(3) }),
      h("span", { class: "value" }, signed(weight)))));
    part.append(
      h("p", { class: "note" }, `${nonzeros.toLocaleString("en")} of ${count(tokens, "token")} `
        + "have a weight on it; the strongest:"),
      h("div", { class: "ends" }, positive.length ? rows(positive) : null,
        negative.length ? rows(negative) : null));
    return part;
  }

  function draw() {
    const host = byId("channels");
    if (!list.length) {
      fill(host, h("p", { class: "faint" }, "The circuit reads and writes no residual channel."));
      return;
    }
    const chips = h("div", { class: "segmented wrap", role: "group", "aria-label": "Channel" },
      list.map((entry) => {
        const sides = [entry.reads.length ? "read" : "", entry.writes.length ? "written" : ""];
        return h("button", {
          type: "button", "aria-pressed": String(entry === shown),
          title: `channel ${entry.channel}, ${sides.filter(Boolean).join(" and ")} by the circuit`,
          onclick: () => { shown = entry; draw(); url.save(); },
        }, `${entry.channel}${entry.writes.length ? entry.reads.length ? " ⇄" : " →" : ""}`);
      }));
    const position = h("div", { class: "table" }, h("h3", {}, "Positions"),
      shown.position
        ? positionChart(shown.position, shown.channel)
        : h("p", { class: "faint" }, "No position has a weight on this channel."));
    fill(host,
      h("p", { class: "note" }, "Channels that the circuit reads; → those that it writes, ⇄ both."),
      chips,
      h("div", { class: "tables" },
        table("Tokens that write to it", shown.embed, "No token has a weight on this channel."),
        position,
        table("Next tokens it speaks for", shown.unembed, "No next token reads this channel.")),
    );
  }

  if (list.length) {
    const telling = (entry) => (entry.embed && entry.reads.length ? 100 : 0);
    shown = list[d3.maxIndex(list, (entry) => worth(entry) + telling(entry))];
  }
  const first = shown;
  const choose = (number) => { shown = list.find((entry) => entry.channel === number) ?? first; };
  const chosen = () => (shown === first ? "" : shown.channel);
  return { draw, of, show, choose, chosen };
})();

function showWords() {
  const words = [
    ["Node", "One neuron, one query, key or value channel, or one channel that a block reads from or "
      + "writes to the residual stream. A number is its index there."],
    ["Residual stream", "What runs through the model beside its blocks: every block reads its channels "
      + "and adds to them."],
    ["Weight", "A line is one nonzero weight of the model between two nodes of the circuit. All nonzero "
      + "ones are drawn, but for those that pruning dropped."],
    ["Ablated", "Fixed at its mean over pretraining text. In the circuit alone, every other node is."],
    ["Effect", "By how many nats the circuit's task loss changes when that node alone is ablated too. "
      + "Purple nodes are needed; green ones do harm."],
    ["By token position", "A node's effect at one token: what the circuit's logit difference between the two "
      + "answers loses when the node is fixed at its mean at that token and nowhere else."],
    ["Task loss", "Cross-entropy between the two candidate answers. Guessing is ln 2 ≈ 0.69; 0 is "
      + "certain and right. The circuit's logits are scaled and shifted as fitted when it was found."],
    ["Counterfactual", "The same prompt, changed only in what decides the answer."],
  ];
  byId("words").append(...words.flatMap(([word, meaning]) => [h("dt", {}, word), h("dd", {}, meaning)]));
  const { layers, width } = data.size;
  byId("footer").textContent = [
    data.model ? `Model ${clip(visible(data.model, false), 80)}` : "Model",
    `${count(layers, "layer")}, width ${width}`,
    `fingerprint ${clip(data.fingerprint, 20)}`,
    `seed ${data.samples.seed}`,
    "made with hf-circuit-sparsity and D3",
  ].join(" · ");
}
