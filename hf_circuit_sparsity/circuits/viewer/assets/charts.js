// Small pictures: histogram, lines over positions, attention pattern, and text in colours.

const svg = (width, height, label) =>
  d3.create("svg:svg").attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img")
    .attr("aria-label", label).attr("class", "chart");

const CHART_TICKS = { size: 4, padding: 5 };

function axis(scale, orient, ticks, format) {
  return orient(scale).ticks(ticks, format).tickSize(CHART_TICKS.size)
    .tickPadding(CHART_TICKS.padding).tickSizeOuter(0);
}

function histogramChart(node, sample) {
  const [width, height, bottom, side] = [340, 96, 22, 10];
  const { counts, zero } = node.histograms[sample];
  const picture = svg(width, height, `Histogram of activations, ${percent(zero)} of them zero`);
  const x = d3.scaleLinear([node.low, node.high], [side, width - side]);
  // Square root, so that rare strong activations are seen beside common weak ones.
  const y = d3.scaleSqrt([0, d3.max(counts) || 1], [0, height - bottom - 6]);
  const step = (node.high - node.low) / counts.length;
  if (step > 0) {
    picture.selectAll("rect").data(counts).join("rect")
      .attr("class", (_, i) => (node.low + (i + 0.5) * step < node.mean ? "bar-negative" : "bar-positive"))
      .attr("x", (_, i) => x(node.low + i * step) + 0.5)
      .attr("width", Math.max(1, x(step) - x(0) - 1))
      .attr("y", (c) => height - bottom - y(c))
      .attr("height", (c) => y(c));
    const mean = Math.min(node.high, Math.max(node.low, node.mean));
    picture.append("path").attr("class", "mark")
      .attr("d", `M${x(mean)},4V${height - bottom}`);
    picture.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`)
      .call(axis(x, d3.axisBottom, 5));
  } else {
    picture.append("text").attr("x", width / 2).attr("y", height / 2).attr("class", "note")
      .attr("text-anchor", "middle").text(`always ${plain(node.low)}`);
  }
  return picture.node();
}

function positionChart(values, channel) {
  const [width, height, bottom, left, side] = [340, 110, 22, 40, 8];
  const picture = svg(width, height, `Position embedding of channel ${channel}`);
  const x = d3.scaleLinear([0, values.length - 1], [left, width - side]);
  const [low, high] = d3.extent(values);
  const y = d3.scaleLinear([Math.min(0, low), Math.max(0, high)], [height - bottom, 8]).nice(3);
  picture.append("path").attr("class", "zero").attr("d", `M${left},${y(0)}H${width - side}`);
  picture.append("g").selectAll("path").data(values).join("path")
    .attr("class", (v) => (v < 0 ? "stem negative" : "stem positive"))
    .attr("d", (v, i) => (v ? `M${x(i)},${y(0)}V${y(v)}` : null));
  picture.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`)
    .call(axis(x, d3.axisBottom, 5));
  picture.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`)
    .call(axis(y, d3.axisLeft, 3));
  return picture.node();
}

// Rows of per mille, one longer than the other: causality leaves only the lower triangle.
function patternRow(flat, query) {
  const start = (query * (query + 1)) / 2;
  return flat.slice(start, start + query + 1).map((value) => value / 1000);
}

function patternChart(ids, flat, query, choose) {
  const size = 340;
  const cell = size / ids.length;
  const picture = svg(size, size, "Attention pattern: a row per looking token, a column per token "
    + "looked at");
  picture.append("path").attr("class", "triangle").attr("d", `M0,0L${size},${size}H0Z`);
  const cells = [];
  for (let row = 0; row < ids.length; row += 1)
    patternRow(flat, row).forEach((weight, column) => {
      if (weight >= 0.01) cells.push({ row, column, weight });
    });
  picture.append("g").selectAll("rect").data(cells).join("rect").attr("class", "cell")
    .attr("x", (d) => d.column * cell).attr("y", (d) => d.row * cell)
    .attr("width", cell).attr("height", cell)
    .each(function strength(d) { this.style.setProperty("--t", Math.sqrt(d.weight)); });
  picture.append("rect").attr("class", "row-mark").attr("x", 0).attr("y", query * cell)
    .attr("width", (query + 1) * cell).attr("height", cell);
  picture.append("rect").attr("class", "catch").attr("width", size).attr("height", size)
    .on("pointermove", (event) => {
      const [row, column] = at(event);
      if (column > row) return tip.hide();
      const weight = patternRow(flat, row)[column];
      return tip.show(event, [
        `${tokenLabel(ids[row], 20)} looks at ${tokenLabel(ids[column], 20)}`,
        `attention ${weight.toFixed(3)}`,
      ]);
    })
    .on("pointerleave", tip.hide)
    .on("click", (event) => choose(at(event)[0]));
  const at = (event) => {
    const [x, y] = d3.pointer(event, picture.node());
    const place = (value) => Math.max(0, Math.min(ids.length - 1, Math.floor(value / cell)));
    return [place(y), place(x)];
  };
  return picture.node();
}

// Tokens with a background by `shade` of their value, whose strongest colour is for `largest`.
function colouredTokens(ids, values, largest, { at = -1, start = 0, shade = (v) => v, onpick } = {}) {
  return h(
    "p", { class: "tokens" },
    ids.map((id, i) => {
      const value = values[i] ?? 0;
      const shown = shade(value);
      const kind = `${shown < 0 ? "negative" : "positive"}${i === at ? " at" : ""}`;
      const text = clip(visible(tokenText(id), false), 24);
      const attributes = {
        class: kind,
        "--t": Math.min(1, Math.abs(shown) / (largest || 1)).toFixed(3),
        title: `${tokenLabel(id, 24)}  ${plain(value)}  (token ${start + i + 1})`,
      };
      if (!onpick) return h("span", attributes, text);
      return h("button", {
        ...attributes, type: "button", "aria-pressed": String(i === at), onclick: () => onpick(i),
        "data-key": `token/${i}`,
      }, text);
    }),
  );
}
