// The graph by nodes: a column for every site, tokens at one end and answers at the other.

const BOX = { width: 58, height: 26 };
// The smallest text is 12 units high; at this scale it is 11 pixels.
const READABLE = 0.92;
// What a box stands for: itself, or the node of which it is one token.
const nodeOf = (box) => (box.at === undefined ? box : box.node);
const describe = (node) => {
  const effect = node.effect === undefined ? "" : `, without it the loss changes by ${signed(node.effect)}`;
  return `${nodeName(node)}, ${nodePlace(node)}${effect}`;
};
const strengthen = (node) => ({ strength: effectStrength(node.effect), helps: node.effect < 0 });

// A scene is what the graph draws: boxes, lines, frames of heads, and where all of that is.
const byNodes = (() => {
  const tallest = d3.max(nodes, (node) => 2 * Math.abs(node.row) + 1) || 1;
  let spacing = { along: 0, across: 0, widths: [] };
  let vertical = false; // tokens at the top, answers at the bottom: on narrow screens
  let box;

  const widthOf = (node) =>
    Math.max(BOX.width, node.kind === "token" || nameOf(node) ? 18 + 8 * nodeLabel(node).length : 0);

  function place(host) {
    // From one column to the next, and from one box to its neighbour.
    const fair = (host.clientWidth / READABLE - 140) / (data.columns.length - 1);
    const along = vertical ? 92 : Math.max(112, Math.min(180, fair));
    const across = vertical ? 74 : tallest > 16 ? 36 : 42;
    for (const node of nodes) {
      const [main, cross] = [node.column * along, -node.row * across];
      [node.x, node.y] = vertical ? [-cross, main] : [main, cross];
      node.width = widthOf(node);
    }
    const widths = data.columns.map((_, i) =>
      d3.max(nodes, (node) => (node.column === i ? node.width : 0)) || BOX.width);
    spacing = { along, across, widths };
    const reach = (tallest / 2) * across;
    const end = (data.columns.length - 1) * along;
    box = vertical
      ? { x: -Math.max(reach, 150), y: -46, width: 2 * Math.max(reach, 150), height: end + 92 }
      : { x: -70, y: -reach - 66, width: end + 140, height: 2 * reach + 78 };
  }

  // Columns of one layer's attention or MLP, which share a band.
  function bands() {
    const found = [];
    data.columns.forEach((column, i) => {
      const last = found.at(-1);
      if (!column.layer) return;
      if (last && last.layer === column.layer && last.block === column.block) last.to = i;
      else found.push({ layer: column.layer, block: column.block, from: i, to: i });
    });
    return found;
  }

  // Past the columns between its ends a line runs straight, clear of their boxes.
  function curvePath({ source, target, via }) {
    const half = (node) => (vertical ? BOX.height : node.width) / 2;
    const [main, cross] = vertical ? ["y", "x"] : ["x", "y"];
    const stops = via.map((row, i) => {
      const column = source.column + i + 1;
      const side = (vertical ? BOX.height : spacing.widths[column]) / 2 + 2;
      const at = column * spacing.along;
      return [at - side, at + side, (vertical ? 1 : -1) * row * spacing.across];
    });
    const point = (m, c) => (vertical ? `${c},${m}` : `${m},${c}`);
    let [m, c] = [source[main] + half(source), source[cross]];
    let path = `M${point(m, c)}`;
    for (const [enter, leave, row] of [...stops, [target[main] - half(target), null, target[cross]]]) {
      const middle = (m + enter) / 2;
      path += `C${point(middle, c)} ${point(middle, row)} ${point(enter, row)}`;
      if (leave !== null) path += `L${point(leave, row)}`;
      [m, c] = [leave, row];
    }
    return path;
  }

  // Bands lie below the lines, titles above them.
  function ground(below, layer) {
    const { along } = spacing;
    const edge = along / 2 - 6;
    for (const band of bands()) {
      const [from, to] = [band.from * along - edge, band.to * along + edge];
      const name = `Layer ${band.layer} ${BLOCKS[band.block] ?? band.block}`;
      if (vertical) {
        below.append("rect").attr("class", "band").attr("rx", 10).attr("x", box.x)
          .attr("y", from).attr("width", box.width).attr("height", to - from);
        layer.append("text").attr("class", "band-name").attr("x", box.x + 8).attr("y", from + 16)
          .text(`${name}: ${roleName(data.columns[band.from])}`);
      } else {
        below.append("rect").attr("class", "band").attr("rx", 12).attr("x", from)
          .attr("y", box.y + 2).attr("width", to - from).attr("height", box.height - 4);
        layer.append("text").attr("class", "band-name").attr("text-anchor", "middle")
          .attr("x", (from + to) / 2).attr("y", box.y + 20).text(name);
      }
    }
    data.columns.forEach((column, i) => {
      const text = layer.append("text").attr("class", "column-name");
      const role = column.role === "qkv" && along < 140 && !vertical
        ? "q · k · v" : roleName(column);
      if (vertical) {
        // The first of a band stands beside its name.
        const first = bands().some((band) => band.from === i);
        text.attr("x", box.x + 8).attr("y", i * along - edge + 16).text(first ? "" : role);
      } else {
        text.attr("text-anchor", "middle").attr("x", i * along).attr("y", box.y + 38).text(role);
      }
    });
  }

  const tips = (node) => [
    `${nodeName(node)}, ${nodePlace(node)}`,
    ...(node.effect === undefined ? [] : [`without it: loss ${signed(node.effect, 3)}`]),
  ];

  function linkTips(link) {
    const ends = `${nodeName(link.source)} → ${nodeName(link.target)}`;
    if (link.kind === "residual") return [ends, "the same residual channel"];
    const what = { weight: "weight", embed: link.source.kind === "token" ? "embedding"
      : "unembedding" }[link.kind];
    return [ends, `${what} ${signed(link.weight, 3)}`,
      ...(link.effect === null ? [] : [`without it: loss ${signed(link.effect, 3)}`])];
  }

  function scene(host, narrow) {
    vertical = narrow;
    place(host);
    return {
      boxes: nodes, lines: links, heads, extent: box, path: curvePath, ground, describe, tips, linkTips,
      shade: (node) => (node.effect === undefined ? null : strengthen(node)),
      selection: (node) => ({ node }), first: nodes[0],
      name: `Graph of ${count(measured.length, "node")}; arrows move between them`,
    };
  }

  return { scene };
})();
