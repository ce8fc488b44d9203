// Small tools: nodes, scales, ticks, units and marks. Text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function svgNode(name, attributes, parent, text) {
  return fill(document.createElementNS(SVG, name), attributes, parent, text);
}

function htmlNode(name, attributes, parent, text) {
  return fill(document.createElement(name), attributes, parent, text);
}

function fill(node, attributes, parent, text) {
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function linearScale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function logScale(low, high, from, to) {
  const scale = linearScale(Math.log(low), Math.log(high), from, to);
  return (value) => scale(Math.log(value));
}

// Round numbers that cut a range into about `count` parts.
function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n++) ticks.push(n * step);
  return ticks;
}

// One, two and five times powers of ten.
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) {
      const tick = factor * 10 ** power;
      if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push(tick);
    }
  }
  return ticks;
}

function unitOf(bytes) {
  const units = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
  return units.find(([, size]) => bytes >= size) || ["B", 1];
}

function bytesText(bytes) {
  const [name, size] = unitOf(bytes);
  return `${short(bytes / size)} ${name}`;
}

function secondsText(seconds) {
  if (seconds === null) return "unknown";
  return seconds >= 1 ? `${short(seconds)} s` : `${short(1e3 * seconds)} ms`;
}

function short(value) {
  return String(Number(value.toPrecision(Math.abs(value) >= 1000 ? 6 : 4)));
}

// Plans of a family look alike; `full` with policies is another family than without.
function familyOf(plan) {
  if (plan.includes("/")) return "mixed";
  const word = plan.match(/^[a-z_]*/)[0];
  if (word === "none") return "none";
  if (word === "uniform" || word === "every") return "uniform";
  if (word === "sqrt") return "sqrt";
  if (word === "log" || word === "binomial") return "log";
  return plan === "full" ? "full" : "kept";
}

// A plan's colour and mark: its family's where they are free, else others that no plan has yet.
const STYLES = new Map();

function styleOf(plan) {
  if (!STYLES.has(plan)) {
    const family = familyOf(plan);
    const names = [family, ...Object.keys(SHAPES).filter((name) => name !== family)];
    const taken = new Set([...STYLES.values()].map(({ colour, shape }) => `${colour} ${shape}`));
    const pairs = names.flatMap((colour) => names.map((shape) => ({ colour, shape })));
    const free = pairs.find(({ colour, shape }) => !taken.has(`${colour} ${shape}`));
    STYLES.set(plan, free || pairs[0]);
  }
  return STYLES.get(plan);
}

const SHAPES = {
  none: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  full: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  kept: (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0Z`,
  uniform: (r) => `M0,${-1.2 * r}L${1.2 * r},${r}H${-1.2 * r}Z`,
  sqrt: (r) => `M0,${1.2 * r}L${1.2 * r},${-r}H${-1.2 * r}Z`,
  log: (r) => cross(r),
  mixed: (r) => star(r),
};

function cross(r) {
  const [a, b] = [0.45 * r, 1.2 * r];
  return `M${-a},${-b}H${a}V${-a}H${b}V${a}H${a}V${b}H${-a}V${a}H${-b}V${-a}H${-a}Z`;
}

function star(r) {
  const points = Array.from({ length: 10 }, (_, n) => {
    const [size, angle] = [n % 2 ? 0.6 * r : 1.4 * r, (Math.PI * n) / 5];
    return `${(size * Math.sin(angle)).toFixed(2)},${(-size * Math.cos(angle)).toFixed(2)}`;
  });
  return `M${points.join("L")}Z`;
}
