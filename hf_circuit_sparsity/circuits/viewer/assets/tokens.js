// The graph by token position: a column for every token of the chosen prompt, a row for every site,
// and a node at each token where it matters to the answer.

const byTokens = (() => {
  const SHARE = 0.05; // of the strongest effect on the prompt, from which on a node is shown
  const MOST = 120; // boxes
  const ATTENDED = 0.02; // attention from which on a line is drawn
  const GAP = { along: 52, aside: 16, stacked: 8 };
  let narrow = false;
  let shown, titles;

  const sample = () => 2 * state.pair + state.side;
  const prompt = () => pairIds(state.pair)[state.side];
  const effectsOf = (node) => node.byToken[sample()];
  const largestOf = (number) => d3.max(measured, (node) => d3.max(node.byToken[number], Math.abs)) || 0;
  const largestOfPair = () => Math.max(largestOf(2 * state.pair), largestOf(2 * state.pair + 1));

  function attention(layer, head) {
    const same = (other) => other.layer === layer && other.head === head;
    return (heads.find(same) ?? data.heads.others.find(same)).circuit[sample()];
  }

  function findBoxes() {
    const { side, ids } = prompt();
    const all = measured.flatMap((node) => effectsOf(node).map((effect, at) => ({ node, at, effect })));
    const least = SHARE * largestOf(sample());
    const strong = all.filter(({ effect }) => effect && Math.abs(effect) >= least);
    const some = d3.sort(strong, ({ effect }) => -Math.abs(effect)).slice(0, MOST);
    const at = new Set([...some.map((place) => place.at), ids.length - 1]);
    const boxes = d3.sort(some, ({ node }) => -node.row).map((place) => ({
      ...place, kind: place.node.kind, column: place.node.column, label: nodeLabel(place.node) }));
    // Tokens at which nothing happens are one mark, where there are several.
    ids.forEach((token, i) => {
      let end = i;
      while (end < ids.length && !at.has(end)) end += 1;
      if (i && !at.has(i) && !at.has(i - 1)) return;
      const single = end - i < 2;
      boxes.push({ node: null, at: i, column: 0, kind: single ? "token" : "gap", token,
        end: Math.max(i, end - 1), label: single ? tokenLabel(token) : `⋯ ${end - i}` });
    });
    const answers = data.columns.length - 1;
    for (const token of [side.target, side.other]) {
      const node = nodes.find((other) => other.site === "answer" && other.index === token) ?? null;
      boxes.push({ node, at: ids.length - 1, column: answers, kind: "token", token, label: tokenLabel(token) });
    }
    boxes.forEach((box, id) => Object.assign(box, { id, ins: [], outs: [],
      width: Math.max(box.kind === "gap" ? 40 : BOX.width, 18 + 8 * box.label.length) }));
    return boxes;
  }

  function findLines(boxes) {
    const lines = [];
    const { ids } = prompt();
    const join = (source, target, weight, kind, link, attended) => {
      const line = { id: lines.length, source, target, weight, kind, link, attended };
      lines.push(line);
      source.outs.push(line);
      target.ins.push(line);
    };
    const of = d3.group(boxes.filter(({ node, column }) => node && column < data.columns.length - 1), ({ node }) => node);
    const pairs = (source, target) => d3.cross(of.get(source) ?? [], of.get(target) ?? []);
    const looks = new Map(); // query or key → what its head writes, and how much it looks there
    for (const link of links) {
      if (link.kind === "embed") continue;
      if (link.head === null) {
        for (const [from, to] of pairs(link.source, link.target))
          if (from.at === to.at) join(from, to, link.weight, link.kind, link);
        continue;
      }
      // What a head brings goes from the tokens that it looks at to the one that looks.
      const { layer } = link.source;
      const flat = attention(layer, link.head);
      const share = (from, to) => (from.at <= to.at ? patternRow(flat, to.at)[from.at] : 0);
      for (const [from, to] of pairs(link.source, link.target))
        if (share(from, to) >= ATTENDED) join(from, to, link.weight * share(from, to), "weight", link, share(from, to));
      for (const node of measured) {
        const asks = node.kind === "q" && node.head === link.head;
        const answers = node.kind === "k" && node.head === link.source.head;
        if (node.layer !== layer || !(asks || answers)) continue;
        for (const [from, to] of pairs(node, link.target)) {
          const much = asks ? Number(from.at === to.at) : share(from, to);
          const known = looks.get(from) ?? looks.set(from, new Map()).get(from);
          if (much >= ATTENDED) known.set(to, Math.max(much, known.get(to) ?? 0));
        }
      }
    }
    for (const [from, targets] of looks)
      for (const [to, much] of targets) join(from, to, much, "attention", null, much);
    for (const [token, channel, weight] of data.tokenWeights.embed)
      for (const to of boxes)
        if (to.kind === "act_in" && to.node.index === channel && ids[to.at] === token)
          join(boxes.find((box) => box.column === 0 && box.at === to.at), to, weight, "embed", null);
    for (const [channel, token, weight] of data.tokenWeights.unembed)
      for (const from of boxes)
        if (from.kind === "resid_delta" && from.node.index === channel && from.at === ids.length - 1)
          join(from, boxes.find((box) => box.column === data.columns.length - 1 && box.token === token), weight, "embed", null);
    return lines;
  }

  // Boxes of one site at one token stand in a block, for which its row and its column have room.
  function place(boxes) {
    const most = narrow ? 2 : 4; // beside each other
    const high = BOX.height + GAP.stacked;
    const blocks = [...d3.group(boxes, ({ column }) => column, ({ at }) => at).values()]
      .flatMap((row) => [...row.values()])
      .map((cell) => {
        const lines = Math.ceil(cell.length / most);
        const columns = Math.ceil(cell.length / lines);
        return { cell, columns, wide: d3.max(cell, ({ width }) => width) + GAP.stacked, lines };
      });
    const middles = (gap, keyOf, sizeOf) => {
      const rooms = d3.rollup(blocks, (some) => d3.max(some, sizeOf), ({ cell }) => keyOf(cell[0]));
      let end = 0;
      return new Map(d3.sort(rooms, ([key]) => key).map(([key, size]) => {
        const from = end;
        end += size + gap;
        return [key, { from, to: from + size, middle: from + size / 2 }];
      }));
    };
    const columns = middles(GAP.aside, ({ at }) => at, (block) => block.columns * block.wide);
    // Tokens below, answers above.
    const rows = middles(GAP.along, ({ column }) => -column, (block) => block.lines * high);
    for (const { cell, columns: across, wide, lines } of blocks) {
      const [x, y] = [columns.get(cell[0].at).middle, rows.get(-cell[0].column).middle];
      cell.forEach((box, i) => {
        const line = Math.floor(i / across);
        const here = Math.min(across, cell.length - line * across);
        box.x = x + ((i % across) - (here - 1) / 2) * wide;
        box.y = y + (line - (lines - 1) / 2) * high;
      });
    }
    titles = [...rows].map(([key, room]) => ({ column: -key, ...room }));
    const left = narrow ? 64 : 150;
    const end = (rooms) => d3.max([...rooms.values()], ({ to }) => to);
    return { x: -left, y: -20, width: end(columns) + left + 16, height: end(rows) + 36 };
  }

  function path({ source, target }) {
    const [from, to] = [source.y - BOX.height / 2, target.y + BOX.height / 2];
    const middle = (from + to) / 2;
    // Past the boxes of its own token that lie between.
    const between = source.at === target.at && shown.boxes.some((box) => box.at === source.at
      && box.column > source.column && box.column < target.column
      && Math.abs(box.x - (source.x + target.x) / 2) < BOX.width);
    const aside = between ? 1.4 * (BOX.width / 2 + 12) : 0;
    return `M${source.x},${from}C${source.x + aside},${middle} ${target.x + aside},${middle} ${target.x},${to}`;
  }

  function ground(below, layer) {
    const { extent } = shown;
    const pad = GAP.along / 2 - 4;
    const ofBlock = ({ column }) => `${data.columns[column].layer} ${data.columns[column].block}`;
    const text = (kind, x, y, words) =>
      layer.append("text").attr("class", kind).attr("x", x).attr("y", y).text(words);
    for (const title of titles) {
      const { role } = data.columns[title.column];
      const short = { tokens: "tokens", qkv: "q · k · v" }[role] ?? role;
      text("column-name", extent.x + 10, title.middle + 4, short);
    }
    for (const rows of d3.group(titles.filter(({ column }) => data.columns[column].layer), ofBlock).values()) {
      const { layer: number, block } = data.columns[rows[0].column];
      const [from, to] = [d3.min(rows, (row) => row.from) - pad, d3.max(rows, (row) => row.to) + pad];
      below.append("rect").attr("class", "band").attr("rx", 10).attr("x", extent.x).attr("y", from)
        .attr("width", extent.width).attr("height", to - from);
      text("band-name", extent.x + 10, from + 17, `Layer ${number} ${BLOCKS[block] ?? block}`);
    }
  }

  const where = (at) => `token ${prompt().start + at + 1}, ${tokenLabel(prompt().ids[at], 24)}`;
  const change = (effect) => `without it there: logit difference ${signed(-effect)}`;
  function describe(box) {
    if (box.kind === "gap") return `Tokens ${prompt().start + box.at + 1} to ${prompt().start + box.end + 1}, at which nothing matters`;
    if (box.effect === undefined) return box.column ? `Answer ${box.label}` : `Prompt, ${where(box.at)}`;
    return `${nodeName(box.node)}, ${nodePlace(box.node)}, at ${where(box.at)}, ${change(box.effect)}`;
  }
  function tips(box) {
    if (box.kind === "gap") return [prompt().ids.slice(box.at, box.end + 1).map((id) => tokenLabel(id)).join(" "),
      "no node matters at these tokens"];
    if (box.effect === undefined) return [describe(box)];
    return [`${nodeName(box.node)}, ${nodePlace(box.node)}`, `at ${where(box.at)}`, change(box.effect)];
  }
  function linkTips(line) {
    const name = (box) => (box.effect === undefined ? describe(box) : nodeName(box.node));
    const ends = `${name(line.source)} → ${name(line.target)}`;
    if (line.kind === "residual") return [ends, "the same residual channel"];
    if (line.kind === "attention")
      return [ends, line.source.kind === "q" ? "asks what its head brings" : `attention ${line.weight.toFixed(2)}`];
    if (line.attended === undefined) return [ends, `weight ${signed(line.weight, 3)}`];
    return [ends, `weight ${signed(line.link.weight, 3)} × attention ${line.attended.toFixed(2)}`,
      `from ${where(line.source.at)}`, `to ${where(line.target.at)}`];
  }

  function scene(host, isNarrow) {
    narrow = isNarrow;
    const boxes = findBoxes();
    const lines = findLines(boxes);
    const extent = place(boxes);
    const largest = largestOfPair() || 1;
    const places = boxes.filter((box) => box.effect !== undefined);
    shown = {
      boxes, lines, heads: [], rows: true, extent, path, ground, describe, tips, linkTips,
      shade: ({ effect }) => (effect === undefined ? null
        : { strength: Math.sqrt(Math.abs(effect) / largest), helps: effect < 0 }),
      selection: ({ node, at }) => (node ? { node, at } : { token: at }),
      first: places[0] ?? boxes[0],
      name: `Graph of ${count(places.length, "node")} at tokens of the prompt; arrows move between them`,
    };
    return shown;
  }

  // What the picture shows, in words.
  function how() {
    const { side } = prompt();
    const there = new Set(shown.boxes.filter((box) => box.effect !== undefined).map((box) => box.node)).size;
    return "A column is a token of the prompt, a row a site, from the bottom to the top. "
      + "A node stands at the tokens where it matters: fixed at its mean there alone, it changes the circuit's "
      + `logit difference between ${tokenLabel(side.target)} and ${tokenLabel(side.other)}, ${signed(side.difference)}, `
      + `by at least ${percent(SHARE)} of the most that any does, ${largestOf(sample()).toFixed(2)}. `
      + `${there} of ${count(measured.length, "node")} ${there === 1 ? "does" : "do"}. What a head brings goes from the tokens it looks `
      + "at to the one that looks, weight times attention; all else stays at its token.";
  }

  return { scene, how, largest: largestOfPair, effectsOf, where };
})();
