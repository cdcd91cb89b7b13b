// The layered graph: boxes, weights, heads; zoom, highlighting and moving about by keyboard.

const graph = (() => {
  const host = byId("graph");
  const NODE = { width: 58, height: 26 };
  // The smallest text is 12 units high; at this scale it is 11 pixels.
  const READABLE = 0.92;
  const STRONGEST = 24; // weights that are written
  const tallest = d3.max(nodes, (node) => 2 * Math.abs(node.row) + 1) || 1;
  let spacing = { along: 0, across: 0, widths: [] };
  let vertical = false; // tokens at the top, answers at the bottom: on narrow screens
  let picture, world, zoom, box;
  let nodeMarks, linkMarks, headMarks, headFrames, labelLayer;

  const widthOf = (node) =>
    Math.max(NODE.width, node.kind === "token" || nameOf(node) ? 18 + 8 * nodeLabel(node).length : 0);

  function place() {
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
      d3.max(nodes, (node) => (node.column === i ? node.width : 0)) || NODE.width);
    spacing = { along, across, widths };
    const reach = (tallest / 2) * across;
    const end = (data.columns.length - 1) * along;
    box = vertical
      ? { x: -Math.max(reach, 150), y: -46, width: 2 * Math.max(reach, 150), height: end + 92 }
      : { x: -70, y: -reach - 66, width: end + 140, height: 2 * reach + 78 };
    return { along, reach };
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
    const half = (node) => (vertical ? NODE.height : node.width) / 2;
    const [main, cross] = vertical ? ["y", "x"] : ["x", "y"];
    const stops = via.map((row, i) => {
      const column = source.column + i + 1;
      const side = (vertical ? NODE.height : spacing.widths[column]) / 2 + 2;
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

  function draw() {
    vertical = host.clientWidth < 560;
    const { along } = place();
    host.replaceChildren();
    host.classList.toggle("vertical", vertical);
    const scale = Math.max(READABLE, Math.min(1.25, host.clientWidth / box.width));
    const height = Math.round(
      // A finger scrolls the page along a graph that runs down.
      Math.min(box.height * scale, vertical ? 2400 : Math.max(420, window.innerHeight * 0.7)),
    );
    picture = d3.select(host).append("svg").attr("height", height).attr("class", "graph")
      .attr("role", "group").attr("aria-label",
        `Graph of ${count(measured.length, "node")}; arrows move between them`);
    world = picture.append("g");
    const below = world.append("g");
    drawHeads();
    drawLinks();
    drawColumns(along, below, world.append("g").attr("class", "titles"));
    drawHeadTitles();
    labelLayer = world.append("g").attr("class", "weights");
    drawNodes();
    addZoom();
    update();
  }

  // Bands lie below the lines, titles above them.
  function drawColumns(along, below, layer) {
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

  function drawHeads() {
    headFrames = world.append("g").selectAll("g").data(heads).join("g").attr("class", "head-frame")
      .on("click", (event, head) => select({ head }));
    headFrames.each(function frame(head) {
      const mates = members(head);
      const pad = vertical ? { x: 6, top: 22, bottom: 7 } : { x: 14, top: 25, bottom: 8 };
      const x = d3.min(mates, (n) => n.x - n.width / 2) - pad.x;
      const y = d3.min(mates, (n) => n.y) - NODE.height / 2 - pad.top;
      const right = d3.max(mates, (n) => n.x + n.width / 2) + pad.x;
      const bottom = d3.max(mates, (n) => n.y) + NODE.height / 2 + pad.bottom;
      d3.select(this).append("rect").attr("rx", 9).attr("x", x).attr("y", y)
        .attr("width", right - x).attr("height", bottom - y);
      head.title = [(x + right) / 2, y + 12];
    });
  }

  // Above the lines, so that it can be hit.
  function drawHeadTitles() {
    headMarks = world.append("g").selectAll("g").data(heads).join("g").attr("class", "head")
      .attr("transform", (head) => `translate(${head.title})`)
      .attr("tabindex", 0).attr("role", "button")
      .attr("aria-label", (head) => `Head ${head.head} of layer ${head.layer}: attention pattern`)
      .on("click", (event, head) => select({ head }))
      .on("keydown", (event, head) => press(event, { head }));
    headMarks.append("rect").attr("x", -27).attr("y", -9).attr("width", 54).attr("height", 18)
      .attr("rx", 9);
    headMarks.append("text").attr("text-anchor", "middle").attr("dy", "0.35em")
      .text((head) => `head ${head.head}`);
  }

  function drawLinks() {
    const sorted = d3.sort(links, (link) => Math.abs(link.weight));
    const group = world.append("g").attr("class", links.length > 60 ? "links many" : "links");
    const marks = (name) => group.append("g").selectAll("path").data(sorted).join("path")
      .attr("d", curvePath).attr("class", name);
    linkMarks = marks((link) =>
      `link ${link.kind} ${link.weight < 0 ? "negative" : "positive"}`)
      .attr("stroke-width", (link) => (link.kind === "residual" ? 1.2 : edgeWidth(link.weight)));
    marks("link-catch").on("click", (event, link) => select({ link }))
      .on("pointerenter pointermove", (event, link) => tip.show(event, linkText(link)))
      .on("pointerleave", tip.hide);
  }

  function linkText(link) {
    const ends = `${nodeName(link.source)} → ${nodeName(link.target)}`;
    if (link.kind === "residual") return [ends, "the same residual channel"];
    const what = { weight: "weight", embed: link.source.kind === "token" ? "embedding"
      : "unembedding" }[link.kind];
    return [ends, `${what} ${signed(link.weight, 3)}`,
      ...(link.effect === null ? [] : [`without it: loss ${signed(link.effect, 3)}`])];
  }

  function drawNodes() {
    nodeMarks = world.append("g").selectAll("g").data(nodes).join("g")
      .attr("class", (node) => `node ${node.kind}`)
      .attr("transform", (node) => `translate(${node.x},${node.y})`)
      .attr("tabindex", 0).attr("role", "button")
      .attr("aria-label", (node) => {
        const effect = node.effect === undefined ? ""
          : `, without it the loss changes by ${signed(node.effect)}`;
        return `${nodeName(node)}, ${nodePlace(node)}${effect}`;
      })
      .on("click", (event, node) => select({ node }))
      .on("keydown", (event, node) => press(event, { node }))
      .on("pointerenter pointermove", (event, node) => tip.show(event, [
        `${nodeName(node)}, ${nodePlace(node)}`,
        ...(node.effect === undefined ? [] : [`without it: loss ${signed(node.effect, 3)}`]),
      ]))
      .on("pointerleave", tip.hide);
    nodeMarks.append("rect").attr("x", (node) => -node.width / 2).attr("y", -NODE.height / 2)
      .attr("width", (node) => node.width).attr("height", NODE.height)
      .attr("rx", (node) => (node.kind === "token" ? 4 : NODE.height / 2));
    nodeMarks.append("text").attr("text-anchor", "middle").attr("dy", "0.35em").text(nodeLabel);
    nodeMarks.filter((node) => state.pins.has(node)).append("circle").attr("r", 5)
      .attr("class", (node) => `dot-mark ${groupClass(node)}`)
      .attr("cx", (node) => 6 - node.width / 2).attr("cy", -NODE.height / 2);
    nodeMarks.each(function colour(node) {
      if (node.effect === undefined) return;
      const strength = effectStrength(node.effect);
      this.style.setProperty("--t", strength.toFixed(3));
      this.classList.add(node.effect < 0 ? "helps" : "harms");
      this.classList.toggle("strong", strength > 0.7);
    });
  }

  // Zoom and drag. A finger scrolls the page until the graph is zoomed in; the wheel needs Ctrl.
  function addZoom() {
    const fit = fitted();
    const free = Math.max(fit.k, READABLE) * 1.02;
    zoom = d3.zoom().scaleExtent([Math.min(fit.k, 0.3), 4])
      .filter((event) => {
        if (event.type === "wheel") return event.ctrlKey || event.metaKey;
        if (event.type.startsWith("touch"))
          return event.touches.length > 1 || d3.zoomTransform(picture.node()).k > free;
        return !event.button;
      })
      .on("start", tip.hide)
      .on("zoom", (event) => {
        world.attr("transform", event.transform);
        picture.classed("zoomed", event.transform.k > free);
      });
    picture.call(zoom).on("dblclick.zoom", null);
    picture.call(zoom.transform, fit);
    const chosen = state.selected?.node;
    // Too much to read at once: begin readable, at what is selected.
    if (fit.k < READABLE - 0.01) {
      const at = chosen ?? nodes[0];
      picture.call(zoom.scaleTo, READABLE);
      const [wide, high] = [host.clientWidth, picture.attr("height")].map((size) => size / READABLE);
      const x = wide >= box.width ? box.x + box.width / 2 : within(at.x, wide, box.x, box.width);
      const y = high >= box.height ? box.y + box.height / 2 : within(at.y, high, box.y, box.height);
      picture.call(zoom.translateTo, x, y);
    }
  }

  // The middle of a window on a stretch, as near to a place as the ends allow.
  const within = (place, window, start, length) =>
    Math.max(start + window / 2, Math.min(start + length - window / 2, place));

  function fitted() {
    const { clientWidth } = host;
    const height = Number(picture.attr("height"));
    const k = Math.min(clientWidth / box.width, height / box.height, 1.3);
    return d3.zoomIdentity
      .translate(clientWidth / 2 - k * (box.x + box.width / 2), height / 2 - k * (box.y + box.height / 2))
      .scale(k);
  }

  const still = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const moved = () => (still() ? picture : picture.transition().duration(180));
  const zoomBy = (factor) => moved().call(zoom.scaleBy, factor);
  const zoomFit = () => moved().call(zoom.transform, fitted());

  function press(event, selection) {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    select(selection);
  }

  // The nearest box in the direction of an arrow.
  function neighbour(node, key) {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    let best = null;
    for (const other of nodes) {
      if (other === node) continue;
      const [x, y] = [other.x - node.x, other.y - node.y];
      const ahead = x * dx + y * dy;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (ahead < 8) continue;
      const distance = ahead + 2.5 * aside;
      if (!best || distance < best.distance) best = { other, distance };
    }
    return best?.other ?? null;
  }

  function moveFocus(key) {
    const focused = document.activeElement?.closest?.(".node, .head");
    const datum = focused ? d3.select(focused).datum() : null;
    let from = datum?.site ? datum : datum ? members(datum)[0] : state.selected?.node;
    from ??= nodes[0];
    const to = focused ? neighbour(from, key) : from;
    if (!to) return;
    focus(to);
    select({ node: to });
  }

  function focus(node) {
    const mark = nodeMarks.filter((other) => other === node).node();
    mark.focus({ preventScroll: true });
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    reveal(node);
  }

  // Move the picture if the box is outside of it.
  function reveal(node) {
    const transform = d3.zoomTransform(picture.node());
    const [x, y] = transform.apply([node.x, node.y]);
    const inside = x > 30 && y > 20 && x < host.clientWidth - 30 && y < picture.attr("height") - 20;
    if (!inside) picture.call(zoom.translateTo, node.x, node.y);
  }

  function cut(node) {
    return node.order !== undefined && node.order >= state.size;
  }

  function update() {
    const { selected, threshold } = state;
    const start = selected?.node ? [selected.node] : selected?.head ? members(selected.head)
      : selected?.link ? [selected.link.source, selected.link.target]
        : selected?.group ? inGroup(selected.group) : null;
    const near = start && state.dim ? trace(start) : null;
    const direct = new Set(start?.map((node) => node.id));
    const touches = (link) => (selected?.link ? selected.link === link
      : direct.has(link.source.id) || direct.has(link.target.id));
    const hidden = (link) =>
      cut(link.source) || cut(link.target)
      || (link.kind !== "residual" && Math.abs(link.weight) < threshold * strongestWeight);
    nodeMarks.classed("cut", cut)
      .classed("far", (node) => near && !near.nodes.has(node.id))
      .classed("selected", (node) => selected?.node === node)
      .attr("aria-pressed", (node) => String(selected?.node === node));
    headFrames.classed("selected", (head) => selected?.head === head);
    headMarks.classed("selected", (head) => selected?.head === head)
      .attr("aria-pressed", (head) => String(selected?.head === head));
    linkMarks.classed("hidden", hidden)
      .classed("far", (link) => near && !near.links.has(link.id))
      .classed("chosen", (link) => selected?.link === link)
      .classed("direct", touches);
    drawWeights(links.filter((link) => link.kind !== "residual" && !hidden(link) && (!near || touches(link))));
    return links.filter((link) => link.kind !== "residual" && !hidden(link)).length;
  }

  // Of the strongest, those for which there is room: on no box, no title and no other weight.
  function drawWeights(shown) {
    const few = d3.sort(shown, (link) => -Math.abs(link.weight)).slice(0, STRONGEST);
    const size = (text) => ({ width: 8 * text.length + 8, height: 20 });
    const taken = [
      ...nodes.map((node) => ({ x: node.x, y: node.y, width: node.width + 4, height: NODE.height + 4 })),
      ...heads.map(({ title: [x, y] }) => ({ x, y, width: 58, height: 20 })),
    ];
    const free = (place) => taken.every((other) =>
      Math.abs(place.x - other.x) * 2 >= place.width + other.width
      || Math.abs(place.y - other.y) * 2 >= place.height + other.height);
    const placed = [];
    for (const link of few) {
      const path = linkMarks.filter((other) => other === link).node();
      const length = path.getTotalLength();
      for (let i = 0; i < 19; i += 1) {
        // From the middle outwards, to either side in turn.
        const share = 0.5 + (i % 2 ? 1 : -1) * Math.ceil(i / 2) * 0.05;
        const { x, y } = path.getPointAtLength(share * length);
        const place = { x, y, ...size(signed(link.weight)) };
        if (!free(place)) continue;
        taken.push(place);
        placed.push({ link, x, y });
        break;
      }
    }
    labelLayer.selectAll("text").data(placed, ({ link }) => link.id).join("text")
      .attr("class", ({ link }) => (link.weight < 0 ? "negative" : "positive"))
      .attr("text-anchor", "middle").attr("dy", "0.32em")
      .attr("x", ({ x }) => x).attr("y", ({ y }) => y)
      .text(({ link }) => signed(link.weight));
  }

  const mark = (found) => nodeMarks.classed("found", (node) => found.has(node));

  return { draw, update, mark, reveal, zoomBy, zoomFit, moveFocus, focus, isVertical: () => vertical };
})();
