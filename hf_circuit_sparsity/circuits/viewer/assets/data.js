// The circuit, read from the page, with what the views ask of it: names, neighbours, scales.

const data = JSON.parse(byId("data").textContent);
const nodes = data.nodes.map((node, id) => ({ ...node, id, ins: [], outs: [] }));
const links = data.links.map(([source, target, weight, kind, via, effect, head], id) => ({
  id, source: nodes[source], target: nodes[target], weight, kind, via, effect, head,
}));
for (const link of links) {
  link.source.outs.push(link);
  link.target.ins.push(link);
}
for (const node of nodes) {
  const [, layer, block] = node.site.split(".");
  if (node.kind !== "token") Object.assign(node, { layer: Number(layer), block });
}
const heads = data.heads.heads;
const PAIR_TOKENS = 48;
const members = (head) =>
  nodes.filter((node) => node.layer === head.layer && node.head === head.head);
const headOf = (node) =>
  heads.find((head) => head.layer === node.layer && head.head === node.head);

const tokenText = (id) => data.tokens[id] ?? `#${id}`;
const tokenLabel = (id, longest = 10) => clip(visible(tokenText(id)), longest);

const WORDS = {
  act_in: "channel", q: "query", k: "key", v: "value", post_act: "neuron", resid_delta: "channel",
};
const ROLES = { tokens: "tokens that decide", qkv: "query · key · value" };
const roleName = (column) => ROLES[column.role] ?? column.role;
const BLOCKS = { attn: "attention", mlp: "MLP" };

const nodeKey = (node) => `${node.site}.${node.index}`;
// What the reader calls it, or who found the circuit.
const nameOf = (node) => state.pins.get(node)?.name || node.name;

function nodeLabel(node) {
  const name = nameOf(node);
  if (name) return clip(visible(name, false), 12);
  if (node.kind === "token") return tokenLabel(node.index);
  return node.head === undefined ? String(node.index) : `${node.kind} ${node.index}`;
}

function nodeName(node) {
  if (node.site === "token") return `Token ${tokenLabel(node.index, 24)}`;
  if (node.site === "answer") return `Answer ${tokenLabel(node.index, 24)}`;
  const word = WORDS[node.kind] ?? node.kind;
  const called = nameOf(node);
  const name = called ? `, “${clip(visible(called, false), 60)}”` : "";
  return `${word[0].toUpperCase()}${word.slice(1)} ${node.index}${name}`;
}

function nodePlace(node) {
  if (node.kind === "token") return node.site === "token" ? "input" : "output";
  const head = node.head === undefined ? "" : `, head ${node.head}`;
  const side = { act_in: ", read", resid_delta: ", written" }[node.kind] ?? "";
  return `layer ${node.layer}, ${BLOCKS[node.block] ?? node.block}${head}${side}`;
}

function nodeMeaning(node) {
  const { kind, index, layer, head } = node;
  const block = BLOCKS[node.block] ?? node.block;
  switch (kind) {
    case "act_in":
      return `What the ${block} of layer ${layer} reads from residual channel ${index}.`;
    case "resid_delta":
      return `What the ${block} of layer ${layer} adds to residual channel ${index}.`;
    case "q": return `Part of what head ${head} looks for: its queries on this channel.`;
    case "k": return `Part of what makes head ${head} look at a token: its keys on this channel.`;
    case "v": return `What head ${head} carries over from the tokens it looks at.`;
    case "post_act": return `A neuron of the MLP in layer ${layer}.`;
    default:
      return node.site === "token"
        ? "One of the tokens in which the example and its counterfactual differ."
        : "One of the two candidates for the next token.";
  }
}

const measured = nodes.filter((node) => node.kind !== "token");
const strongestWeight = d3.max(links, (link) => Math.abs(link.weight)) || 1;
const largestEffect = Math.max(0.05, d3.max(measured, (node) => Math.abs(node.effect)) ?? 0);
// Square root: effects within one circuit span orders of magnitude.
const effectStrength = (effect) => Math.sqrt(Math.min(1, Math.abs(effect) / largestEffect));
const edgeWidth = (weight) => 0.8 + 4.2 * (Math.abs(weight) / strongestWeight);

const curve = data.curve;
const orderOf = new Map(curve.order.map(([site, index], place) => [`${site}/${index}`, place]));
for (const node of measured) node.order = orderOf.get(`${node.site}/${node.index}`);
// Sizes the slider stops at: those up to the whole circuit.
const sliderSizes = curve.sizes.filter((size) => size <= measured.length);
const lossAt = (size) => curve.losses[curve.sizes.indexOf(size)];

// Everything upstream and downstream of some nodes, as sets of node and link ids. Queries and keys
// act through the values of their head.
function trace(start) {
  const found = { nodes: new Set(start.map((node) => node.id)), links: new Set() };
  for (const [side, other, through, mates] of [
    ["ins", "source", ["v"], ["q", "k"]],
    ["outs", "target", ["q", "k"], ["v"]],
  ]) {
    const queue = [...start];
    const seen = new Set(queue);
    while (queue.length) {
      const node = queue.pop();
      const next = node[side].map((link) => (found.links.add(link.id), link[other]));
      const head = through.includes(node.kind) ? headOf(node) : undefined;
      if (head) next.push(...members(head).filter((mate) => mates.includes(mate.kind)));
      for (const neighbour of next) {
        if (seen.has(neighbour)) continue;
        seen.add(neighbour);
        found.nodes.add(neighbour.id);
        queue.push(neighbour);
      }
    }
  }
  return found;
}

const state = {
  view: "nodes", // or "tokens": what a box of the graph is
  selected: null, // { node }, also { node, at } for one token, { head }, { link }, { group } or { token }
  dim: false, // whether what the selection does not touch is dimmed; not before the first click
  threshold: 0, // share of the strongest weight below which weights are hidden
  size: measured.length, // nodes kept, in the order of the curve
  sample: "task", // or "text": which activations are shown
  run: "circuit", // or "model": whose attention is shown
  search: "",
  pins: new Map(), // node → { name, group }, as the reader calls it
  pair: 0, // of prompts
  side: 0, // of the pair
  query: null, // token of it that looks; null is the last
};
