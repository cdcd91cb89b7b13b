// What a node does on texts: on the chosen pair of prompts, over all tokens, and where it is extreme.

const SAMPLES = [["task", "Task prompts"], ["text", "Pretraining text"]];
const CLASSES = ["Class 1", "Class 2"];

// The last tokens of both sides of a pair, of which activations and attention are known.
const pairIds = (pair) => data.pairs[pair].map((side, i) => {
  const length = Math.min(side.ids.length, PAIR_TOKENS);
  return { side, i, ids: side.ids.slice(side.ids.length - length), start: side.ids.length - length };
});
const pairValues = (node, pair, side) => node.pairs[2 * pair + side];

// What it does to the answer, token by token.
function onTokens(node) {
  const { side, ids, start } = pairIds(state.pair)[state.side];
  const effects = byTokens.effectsOf(node);
  const most = d3.maxIndex(effects, Math.abs);
  return [
    h("h3", {}, "Where it matters"),
    sideButtons(),
    colouredTokens(ids, effects, byTokens.largest(), { start, at: state.selected?.at ?? most }),
    h("p", { class: "note" }, "Fixed at its mean at that token alone, it takes this from the circuit's logit "
      + `difference between ${tokenLabel(side.target)} and ${tokenLabel(side.other)}, ${signed(side.difference)}: most at `
      + `${tokenLabel(ids[most], 16)}, ${signed(effects[most])}. The strongest colour is the most that any node `
      + "of the circuit does on this pair."),
  ];
}

// Class 1 | class 2 | difference.
function onPair(node) {
  const sides = pairIds(state.pair);
  const [one, two] = sides.map(({ i }) => pairValues(node, state.pair, i));
  const beside = (value) => value - node.mean;
  const largest = d3.max([...one, ...two], (value) => Math.abs(beside(value)));
  const columns = sides.map(({ side, i, ids, start }) => h("div", {},
    h("h4", {}, `${CLASSES[i]}: ${tokenLabel(side.target)}`),
    colouredTokens(ids, i ? two : one, largest, { start, shade: beside, at: ids.length - 1 }),
    h("p", { class: "note" }, `${plain((i ? two : one).at(-1))} at the last token`)));
  const aligned = one.length === two.length;
  const difference = aligned ? one.map((value, i) => value - two[i]) : [];
  const most = d3.maxIndex(difference, Math.abs);
  columns.push(h("div", {},
    h("h4", {}, "Difference, 1 − 2"),
    aligned
      ? [colouredTokens(sides[0].ids, difference, Math.abs(difference[most]),
        { start: sides[0].start, at: most }),
      h("p", { class: "note" }, `largest ${signed(difference[most])} at `
        + `${tokenLabel(sides[0].ids[most], 16)}`)]
      : h("p", { class: "note" }, "The two prompts are of different length.")));
  return [
    h("h3", {}, `On pair ${state.pair + 1}`),
    h("div", { class: "classes" }, columns),
    h("p", { class: "note" }, "Orange: above the node's mean, blue: below; of the difference, orange: "
      + "higher in class 1. The circuit alone. Other pairs are chosen at the top of the page."),
  ];
}

function exampleRow([sequence, start, at, values], sample, largest, shade, label) {
  const ids = data.sequences[sample][sequence].slice(start, start + values.length);
  return h("li", {},
    h("span", { class: "value" }, label ? h("b", {}, label) : null, ` ${plain(values[at - start])}`),
    colouredTokens(ids, values, largest, { at: at - start, start, shade }));
}

function activationsOf(node) {
  const { sample } = state;
  const { top, bottom, quantiles } = node.examples[sample];
  const beside = (value) => value - node.mean;
  const shown = [...top, ...bottom, ...quantiles].flatMap(([, , , values]) => values);
  const largest = d3.max(shown, (value) => Math.abs(beside(value)));
  const list = (title, examples, none, labels = []) => [
    h("h3", {}, title),
    examples.length
      ? h("ol", { class: "examples" }, examples.map((example, i) =>
        exampleRow(example, sample, largest, beside, labels[i])))
      : h("p", { class: "faint" }, none),
  ];
  return [
    h("h3", {}, "Activation"),
    segmented("Which text", SAMPLES, sample, (value) => { state.sample = value; refresh(); }),
    histogramChart(node, sample),
    h("p", { class: "note" },
      `The line is the node's mean, ${plain(node.mean)}, at which it stands when ablated; orange `
      + `is above it, blue below. Zeros, ${percent(node.histograms[sample].zero)} of the tokens, `
      + "are left out; heights are square roots. "
      + (sample === "task" ? "Measured with the circuit alone." : "Measured in the whole model.")),
    ...list("Highest", top, "Never above its mean here."),
    ...list("At quantiles, of all tokens", quantiles, "",
      data.quantiles.map((share) => `${plain(100 * share)} %`)),
    ...list("Lowest", bottom, "Never below its mean here, but for zeros."),
  ];
}

// What one channel adds to an attention score: query × key, scaled.
function channelScores(node, pair, side, query) {
  if (data.heads.scale === null || !["q", "k"].includes(node.kind)) return null;
  const values = pairValues(node, pair, side);
  const mate = measured.find((other) => other.site === node.mate && other.index === node.index);
  const others = mate ? pairValues(mate, pair, side) : values.map(() => node.mateMean);
  const [q, k] = node.kind === "q" ? [values, others] : [others, values];
  return k.slice(0, query + 1).map((key) => data.heads.scale * q[query] * key);
}

function channelAttention(node) {
  const { ids } = pairIds(state.pair)[state.side];
  const query = queryOf(ids);
  const scores = channelScores(node, state.pair, state.side, query);
  if (!scores) return [];
  const most = d3.maxIndex(scores);
  return [
    h("h3", {}, "What this channel adds to the attention"),
    sideButtons(),
    h("p", { class: "how" }, "Query times key, scaled: from ", h("b", {}, tokenLabel(ids[query], 20)),
      ", most to ", h("b", {}, tokenLabel(ids[most], 20)), ` (${signed(scores[most])}). `,
      node.mateMean === undefined ? "" : `The ${node.kind === "q" ? "key" : "query"} of this channel is `
        + "not in the circuit and stands at its mean. ",
      "Click a token to look from there."),
    colouredTokens(ids, ids.map((_, i) => scores[i] ?? 0), d3.max(scores, Math.abs),
      { at: query, onpick: chooseQuery }),
  ];
}
