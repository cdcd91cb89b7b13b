// A scene, drawn: boxes, weights, heads; zoom, highlighting and moving about by keyboard.

const graph = (() => {
  const host = byId("graph");
  const STRONGEST = 24; // weights that are written
  // Lines that are no weights: they are neither hidden with weak ones nor counted or written.
  const weighs = (line) => line.kind !== "residual" && line.kind !== "attention";
  // The weight of which a line is one token, if it is.
  const linkOf = (line) => (line.link === undefined ? line : line.link);
  let vertical = false; // on narrow screens
  let scene, picture, world, zoom, box, width;
  let nodeMarks, linkMarks, headMarks, headFrames, labelLayer, titleLayer;

  function draw() {
    vertical = host.clientWidth < 560;
    scene = (state.view === "tokens" ? byTokens : byNodes).scene(host, vertical);
    box = scene.extent;
    host.replaceChildren();
    host.classList.toggle("vertical", vertical);
    host.classList.toggle("rows", Boolean(scene.rows));
    const scale = Math.max(READABLE, Math.min(1.25, host.clientWidth / box.width));
    const height = Math.round(
      // A finger scrolls the page along a graph that runs down.
      Math.min(box.height * scale, vertical ? 2400 : Math.max(420, window.innerHeight * 0.7)),
    );
    // What is wider than a narrow screen is scrolled, by a finger like the page.
    width = vertical ? Math.max(host.clientWidth, Math.round(box.width * READABLE)) : host.clientWidth;
    picture = d3.select(host).append("svg").attr("height", height).style("width", `${width}px`)
      .attr("class", "graph")
      .attr("role", "group").attr("aria-label", scene.name);
    world = picture.append("g");
    const below = world.append("g");
    drawHeads();
    drawLinks();
    titleLayer = world.append("g").attr("class", "titles");
    scene.ground(below, titleLayer);
    drawHeadTitles();
    labelLayer = world.append("g").attr("class", "weights");
    drawNodes();
    if (scene.rows) titleLayer.raise(); // they stay where they are while boxes are moved below them
    addZoom();
    update();
  }

  function drawHeads() {
    headFrames = world.append("g").selectAll("g").data(scene.heads).join("g").attr("class", "head-frame")
      .on("click", (event, head) => select({ head }));
    headFrames.each(function frame(head) {
      const mates = members(head);
      const pad = vertical ? { x: 6, top: 22, bottom: 7 } : { x: 14, top: 25, bottom: 8 };
      const x = d3.min(mates, (n) => n.x - n.width / 2) - pad.x;
      const y = d3.min(mates, (n) => n.y) - BOX.height / 2 - pad.top;
      const right = d3.max(mates, (n) => n.x + n.width / 2) + pad.x;
      const bottom = d3.max(mates, (n) => n.y) + BOX.height / 2 + pad.bottom;
      d3.select(this).append("rect").attr("rx", 9).attr("x", x).attr("y", y)
        .attr("width", right - x).attr("height", bottom - y);
      head.title = [(x + right) / 2, y + 12];
    });
  }

  // Above the lines, so that it can be hit.
  function drawHeadTitles() {
    headMarks = world.append("g").selectAll("g").data(scene.heads).join("g").attr("class", "head")
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
    const { lines } = scene;
    const sorted = d3.sort(lines, (line) => Math.abs(line.weight));
    const group = world.append("g").attr("class", lines.length > 60 ? "links many" : "links");
    const marks = (name) => group.append("g").selectAll("path").data(sorted).join("path")
      .attr("d", scene.path).attr("class", name);
    linkMarks = marks((line) =>
      `link ${line.kind} ${line.weight < 0 ? "negative" : "positive"}`)
      .attr("stroke-width", (line) => (weighs(line) ? edgeWidth(line.weight) : 1.2 + 2 * line.weight));
    marks("link-catch")
      .on("click", (event, line) => select(linkOf(line) ? { link: linkOf(line) } : scene.selection(line.source)))
      .on("pointerenter pointermove", (event, line) => tip.show(event, scene.linkTips(line)))
      .on("pointerleave", tip.hide);
  }

  function drawNodes() {
    nodeMarks = world.append("g").selectAll("g").data(scene.boxes).join("g")
      .attr("class", (node) => `node ${node.kind}`)
      .attr("transform", (node) => `translate(${node.x},${node.y})`)
      .attr("tabindex", 0).attr("role", "button")
      .attr("aria-label", scene.describe)
      .on("click", (event, node) => select(scene.selection(node)))
      .on("keydown", (event, node) => press(event, scene.selection(node)))
      .on("pointerenter pointermove", (event, node) => tip.show(event, scene.tips(node)))
      .on("pointerleave", tip.hide);
    nodeMarks.append("rect").attr("x", (node) => -node.width / 2).attr("y", -BOX.height / 2)
      .attr("width", (node) => node.width).attr("height", BOX.height)
      .attr("rx", (node) => (node.kind === "token" ? 4 : BOX.height / 2));
    nodeMarks.append("text").attr("text-anchor", "middle").attr("dy", "0.35em")
      .text((node) => node.label ?? nodeLabel(node));
    nodeMarks.filter((node) => state.pins.has(nodeOf(node))).append("circle").attr("r", 5)
      .attr("class", (node) => `dot-mark ${groupClass(nodeOf(node))}`)
      .attr("cx", (node) => 6 - node.width / 2).attr("cy", -BOX.height / 2);
    nodeMarks.each(function colour(node) {
      const shade = scene.shade(node);
      if (!shade) return;
      this.style.setProperty("--t", shade.strength.toFixed(3));
      this.classList.add(shade.helps ? "helps" : "harms");
      this.classList.toggle("strong", shade.strength > 0.7);
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
        keepTitles();
        picture.classed("zoomed", event.transform.k > free);
      });
    picture.call(zoom).on("dblclick.zoom", null);
    picture.call(zoom.transform, fit);
    // Too much to read at once: begin readable, at what is selected.
    if (fit.k < READABLE - 0.01) {
      const at = chosen()?.[0] ?? scene.first;
      picture.call(zoom.scaleTo, READABLE);
      const [wide, high] = [width, picture.attr("height")].map((size) => size / READABLE);
      const x = wide >= box.width ? box.x + box.width / 2 : within(at.x, wide, box.x, box.width);
      const y = high >= box.height ? box.y + box.height / 2 : within(at.y, high, box.y, box.height);
      picture.call(zoom.translateTo, x, y);
    }
    const at = chosen()?.[0] ?? scene.first;
    host.scrollLeft = d3.zoomTransform(picture.node()).applyX(at.x) - host.clientWidth / 2;
  }

  // Titles that stand at the left of rows stay there, however far the picture is moved.
  function keepTitles() {
    if (!scene.rows) return;
    const transform = d3.zoomTransform(picture.node());
    titleLayer.attr("transform", `translate(${Math.max(0, transform.invertX(host.scrollLeft) - box.x)},0)`);
  }
  host.addEventListener("scroll", keepTitles);

  // The middle of a window on a stretch, as near to a place as the ends allow.
  const within = (place, window, start, length) =>
    Math.max(start + window / 2, Math.min(start + length - window / 2, place));

  function fitted() {
    const height = Number(picture.attr("height"));
    const k = Math.min(width / box.width, height / box.height, 1.3);
    return d3.zoomIdentity
      .translate(width / 2 - k * (box.x + box.width / 2), height / 2 - k * (box.y + box.height / 2))
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
    for (const other of scene.boxes) {
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
    const isBox = focused?.classList.contains("node");
    const from = (isBox ? datum : focused ? members(datum)[0] : chosen()?.[0]) ?? scene.first;
    const to = focused ? neighbour(from, key) : from;
    if (!to) return;
    focus(to);
    select(scene.selection(to));
  }

  function focus(node) {
    const mark = nodeMarks.filter((other) => other === node).node();
    mark.focus({ preventScroll: true });
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    bringIn(node);
  }

  // The boxes of a selection; null where it has none here.
  function chosen(selected = state.selected) {
    if (!selected) return null;
    const { node, head, link, group, token, at } = selected;
    const among = node ? [node] : head ? members(head) : group ? inGroup(group) : [];
    let found = link
      ? scene.lines.filter((line) => linkOf(line) === link).flatMap((line) => [line.source, line.target])
      : scene.boxes.filter((other) => (token === undefined ? among.includes(nodeOf(other)) : other.at === token));
    const here = found.filter((other) => other.at === at);
    if (at !== undefined && here.length) found = here;
    return found.length ? found : null;
  }

  // Move the picture if what is selected is outside of it.
  function reveal(selection) {
    const found = chosen(selection);
    if (found) bringIn(found[0]);
  }

  function bringIn(node) {
    const transform = d3.zoomTransform(picture.node());
    const [x, y] = transform.apply([node.x, node.y]);
    const inside = x > 30 && y > 20 && x < width - 30 && y < picture.attr("height") - 20;
    if (!inside) picture.call(zoom.translateTo, node.x, node.y);
  }

  function cut(other) {
    const node = nodeOf(other) ?? {};
    return node.order !== undefined && node.order >= state.size;
  }

  function update() {
    const { selected, threshold } = state;
    const start = chosen();
    const near = start && state.dim ? trace(start) : null;
    const direct = new Set(start?.map((node) => node.id));
    const touches = (link) => (selected?.link ? selected.link === linkOf(link)
      : direct.has(link.source.id) || direct.has(link.target.id));
    const hidden = (link) =>
      cut(link.source) || cut(link.target)
      || (weighs(link) && Math.abs(link.weight) < threshold * strongestWeight);
    const isChosen = (other) => (selected?.token === undefined
      ? selected?.node !== undefined && selected.node === nodeOf(other) && start.includes(other)
      : other.at === selected.token && other.column === 0);
    nodeMarks.classed("cut", cut)
      .classed("far", (node) => near && !near.nodes.has(node.id))
      .classed("selected", isChosen)
      .attr("aria-pressed", (node) => String(isChosen(node)));
    headFrames.classed("selected", (head) => selected?.head === head);
    headMarks.classed("selected", (head) => selected?.head === head)
      .attr("aria-pressed", (head) => String(selected?.head === head));
    linkMarks.classed("hidden", hidden)
      .classed("far", (link) => near && !near.links.has(link.id))
      .classed("chosen", (link) => selected?.link !== undefined && selected.link === linkOf(link))
      .classed("direct", touches);
    const all = scene.lines.filter(weighs);
    const visible = all.filter((link) => !hidden(link));
    drawWeights(visible.filter((link) => !near || touches(link)));
    return { shown: visible.length, all: all.length };
  }

  // Of the strongest, those for which there is room: on no box, no title and no other weight.
  function drawWeights(shown) {
    const few = d3.sort(shown, (link) => -Math.abs(link.weight)).slice(0, STRONGEST);
    const size = (text) => ({ width: 8 * text.length + 8, height: 20 });
    const taken = [
      ...scene.boxes.map((node) => ({ x: node.x, y: node.y, width: node.width + 4, height: BOX.height + 4 })),
      ...scene.heads.map(({ title: [x, y] }) => ({ x, y, width: 58, height: 20 })),
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

  const mark = (found) => nodeMarks.classed("found", (node) => found.has(nodeOf(node)));

  return { draw, update, mark, reveal, zoomBy, zoomFit, moveFocus, focus, isVertical: () => vertical };
})();
