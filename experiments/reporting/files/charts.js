// The charts: each draws into an element and knows nothing of the page's controls.

// Of a drawing, in its own units. One on a phone is scaled less, so that its text stays readable.
const WIDE = 760;
const NARROW = 380;
const BREAK = 600; // pixels of the chart's place
const KEY_LINE = 17;
const DASHES = ["", "9 4", "3 3", "9 3 2 3", "14 4", "2 5", "6 2 2 2 2 2"];

function isNarrow(box) {
  return box.clientWidth > 0 && box.clientWidth < BREAK;
}

// Axes with grid, ticks and names; returns the drawing and its edges. A key of so many lines stands
// at the right, or below where there is no room beside.
function axes(box, { height, x, y, key = 0, beside = 20, left = 64 }) {
  box.replaceChildren();
  const narrow = isNarrow(box);
  const [width, right] = narrow ? [NARROW, 14] : [WIDE, beside];
  const below = narrow && key ? KEY_LINE * (key + 1) : 0;
  const size = `0 0 ${width} ${height + below}`;
  const root = svgNode("svg", { viewBox: size, role: "img" }, box);
  const edges = { left, right: width - right, top: 14, bottom: height - 46, width, narrow };
  const scaleX = x.scale(edges.left, edges.right);
  const scaleY = y.scale(edges.bottom, edges.top);
  for (const tick of y.ticks) {
    const at = scaleY(tick);
    svgNode("line", { class: "grid", x1: edges.left, x2: edges.right, y1: at, y2: at }, root);
    const place = { class: "tick", x: edges.left - 8, y: at + 4, "text-anchor": "end" };
    svgNode("text", place, root, y.text(tick));
  }
  // Every other number where there is half the room.
  for (const tick of x.ticks.filter((_, n) => !narrow || x.ticks.length < 5 || n % 2 === 0)) {
    const at = scaleX(tick);
    svgNode("line", { class: "grid", x1: at, x2: at, y1: edges.top, y2: edges.bottom }, root);
    const place = { class: "tick", x: at, y: edges.bottom + 18, "text-anchor": "middle" };
    svgNode("text", place, root, x.text(tick));
  }
  const frame = `M${edges.left},${edges.top}V${edges.bottom}H${edges.right}`;
  svgNode("path", { class: "axis", fill: "none", d: frame }, root);
  const middle = (edges.left + edges.right) / 2;
  const under = { class: "axis-label", x: middle, y: height - 8, "text-anchor": "middle" };
  svgNode("text", under, root, x.name);
  const upright = { class: "axis-label", "text-anchor": "middle" };
  upright.transform = `translate(14,${(edges.top + edges.bottom) / 2}) rotate(-90)`;
  svgNode("text", upright, root, y.name);
  return { root, edges, scaleX, scaleY };
}

function empty(box, text) {
  box.replaceChildren();
  htmlNode("p", { class: "empty" }, box, text);
}

function range(values, margin) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || high || 1) * margin;
  return [Math.max(0, low - room), high + room];
}

// Memory against time. Returns a function that greys what is above a budget.
function timeChart(box, group, { chosen, hover }) {
  const timed = group.points.filter((point) => point.step_seconds !== null);
  if (!timed.length) {
    empty(box, "No row says how long a step takes.");
    return () => {};
  }
  const [lowX, highX] = range(timed.map((point) => point.peak_bytes), 0.12);
  const times = timed.flatMap((point) => [point.step_seconds, ...(point.step_spread || [])]);
  const [lowY, highY] = range(times, 0.15);
  const [unit, size] = unitOf(highX);
  const [time, factor] = highY >= 1 ? ["s", 1] : ["ms", 1e3];
  const chart = axes(box, {
    height: 420,
    x: {
      name: `compiled peak, ${unit}`,
      scale: (a, b) => linearScale(lowX, highX, a, b),
      ticks: linearTicks(lowX / size, highX / size, 7).map((tick) => tick * size),
      text: (tick) => short(tick / size),
    },
    y: {
      name: `step time, ${time}`,
      scale: (a, b) => linearScale(lowY, highY, a, b),
      ticks: linearTicks(lowY * factor, highY * factor, 6).map((tick) => tick / factor),
      text: (tick) => short(tick * factor),
    },
  });
  drawFrontier(chart, group);
  const { top, bottom } = chart.edges;
  const limit = svgNode("line", { class: "budget", y1: top, y2: bottom }, chart.root);
  const name = { class: "budget-name", y: top + 8, "text-anchor": "end" };
  const limitName = svgNode("text", name, chart.root, "budget");
  const nodes = drawPoints(chart, timed, { chosen, hover });
  return (budget, best) => {
    const at = Math.min(chart.scaleX(budget), chart.edges.right);
    limit.setAttribute("x1", at);
    limit.setAttribute("x2", at);
    limitName.setAttribute("x", Math.max(at - 5, chart.edges.left + 50));
    for (const [point, node] of nodes) {
      node.classList.toggle("out", point.peak_bytes > budget);
      node.classList.toggle("best", point === best);
    }
  };
}

// Steps: with a budget between two points, the one of the smaller peak is what can be had.
function drawFrontier(chart, group) {
  const corners = group.frontier.map((place) => group.points[place]);
  let path = "";
  for (const point of corners) {
    const [x, y] = [chart.scaleX(point.peak_bytes), chart.scaleY(point.step_seconds)];
    path += path ? `H${x}V${y}` : `M${x},${chart.edges.top}V${y}`;
  }
  if (!path) return;
  svgNode("path", { class: "frontier", d: `${path}H${chart.edges.right}` }, chart.root);
  const place = { class: "faint", x: chart.scaleX(corners[0].peak_bytes) + 5, y: chart.edges.top + 8 };
  svgNode("text", place, chart.root, "frontier");
}

function drawPoints(chart, points, { chosen, hover }) {
  const marks = points.map((point) => ({
    point,
    x: chart.scaleX(point.peak_bytes),
    y: chart.scaleY(point.step_seconds),
  }));
  const taken = marks.map(({ x, y }) => [x - 8, y - 8, x + 8, y + 8]);
  return marks.map(({ point, x, y }) => {
    const { colour, shape } = styleOf(point.plan);
    const node = svgNode("g", { class: `point ${colour}`, tabindex: 0 }, chart.root);
    node.setAttribute("role", "button");
    node.setAttribute("data-plan", point.plan);
    const spoken = `${point.plan}: ${bytesText(point.peak_bytes)}, `;
    node.setAttribute("aria-label", spoken + secondsText(point.step_seconds));
    if (point.step_spread) {
      const [low, high] = point.step_spread.map(chart.scaleY);
      svgNode("path", { class: "spread", d: `M${x - 4},${low}h8m-4,0V${high}m-4,0h8` }, node);
    }
    svgNode("path", { class: "mark", d: SHAPES[shape](6), transform: `translate(${x},${y})` }, node);
    drawLabel(node, chart.edges, taken, shortened(point.plan, 30), x, y);
    node.addEventListener("click", () => chosen(point));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        chosen(point);
      }
    });
    for (const name of ["pointerenter", "focus"]) {
      node.addEventListener(name, () => hover(point, node));
    }
    for (const name of ["pointerleave", "blur"]) node.addEventListener(name, () => hover(null));
    return [point, node];
  });
}

// A plan's name beside its mark, where nothing else stands; where all is taken there is none.
function drawLabel(node, edges, taken, text, x, y) {
  const width = 6.9 * text.length;
  const places = [
    [x + 11, y + 4, "start"], [x - 11, y + 4, "end"],
    [x, y - 12, "middle"], [x, y + 22, "middle"],
    [x + 9, y - 10, "start"], [x + 9, y + 19, "start"],
    [x - 9, y - 10, "end"], [x - 9, y + 19, "end"],
  ];
  for (const [left, base, anchor] of places) {
    const shift = { start: 0, middle: width / 2, end: width }[anchor];
    const area = [left - shift, base - 11, left - shift + width, base + 4];
    const inside = area[0] > edges.left && area[2] < edges.width && area[1] > 0 && area[3] < edges.bottom;
    if (inside && !taken.some((other) => overlap(area, other))) {
      taken.push(area);
      svgNode("text", { x: left, y: base, "text-anchor": anchor }, node, text);
      return;
    }
  }
}

function overlap(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

function shortened(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

// Lines with their names at the right; `series` is [{name, plan, xs, ys}].
function drawLines(chart, series, marked) {
  const ends = [];
  series.forEach(({ plan, xs, ys }, number) => {
    const places = [];
    ys.forEach((y, n) => {
      if (y !== null) places.push([chart.scaleX(xs[n]), chart.scaleY(y)]);
    });
    const { colour, shape } = styleOf(plan);
    const path = { class: `line ${colour}`, "data-plan": plan };
    path.d = `M${places.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L")}`;
    if (marked) path["stroke-dasharray"] = DASHES[number % DASHES.length];
    const line = svgNode("path", path, chart.root);
    // Lines that lie on each other are seen as the lower one being wider.
    if (!marked) line.style.strokeWidth = `${2 + 1.4 * (series.length - 1 - number)}px`;
    for (const [x, y] of marked ? places : []) {
      const mark = { d: SHAPES[shape](5), transform: `translate(${x},${y})` };
      svgNode("path", { class: `mark ${colour}`, ...mark }, chart.root);
    }
    ends.push({ number, y: places.length ? places.at(-1)[1] : chart.edges.top });
  });
  drawKey(chart, series, ends, marked);
}

function drawKey(chart, series, ends, marked) {
  ends.sort((a, b) => a.y - b.y);
  let last = chart.edges.top - 8;
  ends.forEach(({ number, y }, place) => {
    const room = KEY_LINE * (ends.length - place);
    last = chart.edges.narrow
      ? chart.edges.bottom + 46 + KEY_LINE * (place + 0.5)
      : Math.max(last + KEY_LINE, Math.min(y, chart.edges.bottom - room + 12));
    const { plan, name } = series[number];
    const left = chart.edges.narrow ? chart.edges.left : chart.edges.right + 8;
    const lines = { class: `line ${styleOf(plan).colour}` };
    if (marked) lines["stroke-dasharray"] = DASHES[number % DASHES.length];
    svgNode("path", { ...lines, d: `M${left},${last}h24` }, chart.root);
    const { colour, shape } = styleOf(plan);
    const mark = { class: `mark ${colour}`, transform: `translate(${left + 12},${last})` };
    svgNode("path", { ...mark, d: SHAPES[shape](4) }, chart.root);
    svgNode("text", { x: left + 30, y: last + 4 }, chart.root, shortened(name, 28));
  });
}

function depthChart(box, lines, quantity) {
  const slopes = { temps: "temp_slope", peaks: "peak_slope" }[quantity];
  const shown = lines.filter((line) => line[slopes] !== null);
  if (!shown.length) {
    empty(box, "No plan has rows at two depths or more: --depth 8 --depth 16 of experiments.sweep.");
    return;
  }
  const depths = [...new Set(shown.flatMap((line) => line.depths))].sort((a, b) => a - b);
  const values = shown.flatMap((line) => line[quantity]);
  const [low, high] = [Math.min(...values) / 1.25, Math.max(...values) * 1.25];
  const [unit, size] = unitOf(high);
  const chart = axes(box, {
    height: 400,
    beside: 260,
    key: shown.length,
    x: {
      name: "blocks",
      scale: (a, b) => logScale(depths[0] / 1.1, depths.at(-1) * 1.1, a, b),
      ticks: depths.length > 8 ? depths.filter((_, n) => n % 2 === 0) : depths,
      text: String,
    },
    y: {
      name: `${quantity === "peaks" ? "compiled peak" : "temporaries"}, ${unit}`,
      scale: (a, b) => logScale(low, high, a, b),
      ticks: logTicks(low / size, high / size).map((tick) => tick * size),
      text: (tick) => short(tick / size),
    },
  });
  const series = shown.map((line) => ({
    plan: line.plan,
    name: `${shortened(line.plan, 16)}  slope ${line[slopes].toFixed(2)}`,
    xs: line.depths,
    ys: line[quantity],
  }));
  drawLines(chart, series, true);
}

function bufferChart(box, point) {
  if (!point || !point.buffers.length) {
    empty(box, "The compiler named no buffers for this plan.");
    return;
  }
  const [row, left, width] = [34, 92, isNarrow(box) ? NARROW : WIDE];
  box.replaceChildren();
  const height = row * point.buffers.length + 8;
  const root = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, box);
  const scale = linearScale(0, point.buffers[0].size_bytes, 0, width - left - 8);
  point.buffers.forEach((buffer, number) => {
    const y = number * row + 4;
    const place = { x: left - 8, y: y + 12, "text-anchor": "end" };
    svgNode("text", place, root, bytesText(buffer.size_bytes));
    const bar = { x: left, y: y + 2, width: Math.max(1, scale(buffer.size_bytes)), height: 11 };
    svgNode("rect", { class: "bar", ...bar, rx: 2 }, root);
    const operation = buffer.operation.split("/").slice(-3).join("/");
    const text = [buffer.shape, buffer.source, operation].filter(Boolean).join("  ");
    const below = { class: "faint", x: left, y: y + 26 };
    svgNode("text", below, root, shortened(text, Math.floor((width - left) / 6.6)));
  });
}

function lossChart(box, group) {
  const runs = group.points.filter((point) => point.losses.length);
  const values = runs.flatMap((point) => point.losses).filter((value) => value !== null);
  if (!values.length) {
    empty(box, "No losses: these rows were compiled for a chip that is not present.");
    return;
  }
  const steps = Math.max(...runs.map((point) => point.losses.length));
  const [low, high] = range(values, 0.06);
  const chart = axes(box, {
    height: 360,
    beside: 200,
    key: runs.length,
    x: {
      name: "step",
      scale: (a, b) => linearScale(1, Math.max(2, steps), a, b),
      ticks: linearTicks(1, steps, 8).filter((tick) => Number.isInteger(tick)),
      text: String,
    },
    y: {
      name: "training loss, nats per token",
      scale: (a, b) => linearScale(low, high, a, b),
      ticks: linearTicks(low, high, 6),
      text: short,
    },
  });
  const series = runs.map((point) => ({
    plan: point.plan,
    name: shortened(point.plan, 22),
    xs: point.losses.map((_, n) => n + 1),
    ys: point.losses,
  }));
  drawLines(chart, series, false);
}
