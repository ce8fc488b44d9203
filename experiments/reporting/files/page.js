// The page: what is chosen, and the charts that follow from it.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const STEPS = 1000; // of the slider, from no plan that fits to all of them
let group = null;
let markBudget = () => {};

function start() {
  data.groups.forEach((one, number) => {
    const plans = `${one.points.length} plan${one.points.length > 1 ? "s" : ""}`;
    htmlNode("option", { value: number }, at("group"), `${one.name} (${plans})`);
  });
  at("group").addEventListener("change", showGroup);
  at("budget").addEventListener("input", showBudget);
  at("quantity").addEventListener("change", showDepth);
  at("plan").addEventListener("change", showBuffers);
  const problems = data.failed.map(([what, error]) => `failed: ${what}: ${error}`);
  for (const text of problems.concat(data.skipped.map((line) => `skipped: ${line}`))) {
    htmlNode("li", {}, at("problems"), text);
  }
  const origins = new Set(data.groups.flatMap((one) => one.points.map((point) => point.origin)));
  at("origin").textContent = [...origins].filter(Boolean).slice(0, 3).join("; ");
  // In the order of the page, so that a plan looks the same in every group and chart.
  for (const one of data.groups) for (const point of one.points) styleOf(point.plan);
  let wasNarrow = isNarrow(at("time"));
  window.addEventListener("resize", () => {
    if (isNarrow(at("time")) !== wasNarrow) {
      wasNarrow = !wasNarrow;
      showCharts();
    }
  });
  showGroup();
}

function showGroup() {
  group = data.groups[Number(at("group").value) || 0];
  const said = new Set(group.points.map((point) => point.about).filter(Boolean));
  const dates = group.points.map((point) => point.date).filter(Boolean).sort();
  const days = dates[0] === dates.at(-1) ? dates.slice(0, 1) : [`${dates[0]} to ${dates.at(-1)}`];
  at("about").textContent = [...said, ...days].join("; ");
  const sources = [...new Set(group.points.map((point) => point.seconds_source))];
  const untimed = group.points.filter((point) => point.step_seconds === null).length;
  at("time-note").textContent =
    `Times: ${sources.join(", ")}.` + (untimed ? ` ${untimed} without a time are not drawn.` : "");
  at("budget").max = STEPS;
  at("budget").value = STEPS;
  const plans = group.points.map((point) => point.plan);
  at("plan").replaceChildren();
  for (const plan of plans) htmlNode("option", { value: plan }, at("plan"), plan);
  at("loss-note").textContent = lossText();
  showCharts();
  showRows();
}

function showCharts() {
  markBudget = timeChart(at("time"), group, { chosen: choose, hover: showTip });
  showBudget();
  showDepth();
  showBuffers();
  lossChart(at("loss"), group);
}

function lossText() {
  const difference = group.loss_difference;
  if (difference === null) return "";
  const size = difference === 0 ? "none" : `${difference.toExponential(1)} of the loss`;
  return (
    `Largest difference between two plans at any step: ${size}. All plans compute the same loss, ` +
    "but in another order; rounding lets their curves part late in a long run."
  );
}

// The slider's ends: a little below the smallest peak, and the largest.
function budgetBytes() {
  const peaks = group.points.map((point) => point.peak_bytes);
  const [low, high] = [0.95 * Math.min(...peaks), Math.max(...peaks)];
  return Math.ceil(low + ((high - low) * Number(at("budget").value)) / STEPS);
}

function bestWithin(budget) {
  const fits = group.points.filter((p) => p.peak_bytes <= budget && p.step_seconds !== null);
  fits.sort((a, b) => a.step_seconds - b.step_seconds || a.peak_bytes - b.peak_bytes);
  return fits[0] || null;
}

function showBudget() {
  const budget = budgetBytes();
  const best = bestWithin(budget);
  at("budget-text").textContent = bytesText(budget);
  at("best").textContent = bestText(best, budget);
  markBudget(budget, best);
}

function bestText(best, budget) {
  if (!best) return "No plan fits.";
  const text = (point) => `${point.plan}, ${bytesText(point.peak_bytes)}, `;
  const places = group.ties[group.points.indexOf(best)];
  const asFast = places.map((n) => group.points[n]).filter((p) => p.peak_bytes <= budget);
  if (!asFast.length) return `Fastest that fits: ${text(best)}${secondsText(best.step_seconds)}`;
  const names = [best, ...asFast].map((point) => point.plan);
  return `Within noise of each other: ${names.slice(0, -1).join(", ")} and ${names.at(-1)}, about ${secondsText(best.step_seconds)}`;
}

function showDepth() {
  const lines = data.lines.filter((line) => line.family === group.family);
  const quantity = at("quantity").value;
  depthChart(at("depth"), lines, quantity);
  at("depth-note").textContent = lines.length
    ? "Both axes are logarithmic; slopes are fitted by least squares. 1 grows as the depth, 0.5 as " +
      "its square root." +
      (quantity === "peaks" ? " A peak holds parameters and optimizer state too." : "")
    : "";
}

function showBuffers() {
  const plan = at("plan").value;
  bufferChart(at("buffers"), group.points.find((point) => point.plan === plan));
}

function choose(point) {
  at("plan").value = point.plan;
  showBuffers();
  copy(point.command);
}

function copy(text) {
  const said = (done) => {
    at("copied").textContent = done ? `Copied: ${text}` : `Copy this: ${text}`;
  };
  if (!text) at("copied").textContent = "This row does not say its command line.";
  else if (navigator.clipboard) {
    navigator.clipboard.writeText(text).then(() => said(true), () => said(copyBySelection(text)));
  } else said(copyBySelection(text));
}

// For pages that may not use the clipboard's own interface.
function copyBySelection(text) {
  const area = htmlNode("textarea", {}, document.body);
  area.value = text;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// The quartiles; half of the steps took that long.
function spreadText(point) {
  if (!point.step_spread) return "";
  const factor = point.step_seconds >= 1 ? 1 : 1e3; // the unit of the median
  const ends = point.step_spread.map((end) => Number((factor * end).toPrecision(3)));
  return ` (${ends.join(" to ")})`;
}

function showTip(point, node) {
  const tip = at("tip");
  tip.replaceChildren();
  tip.hidden = point === null;
  if (point === null) return;
  const lines = [
    point.plan,
    `compiled peak ${bytesText(point.peak_bytes)}`,
    point.runtime_bytes === null ? "" : `runtime peak ${bytesText(point.runtime_bytes)}`,
    `step ${secondsText(point.step_seconds)}${spreadText(point)}, ${point.seconds_source}`,
    point.recomputed === null ? "" : `recomputed ${(100 * point.recomputed).toFixed(1)} %`,
    point.losses.length ? `last loss ${short(point.losses.at(-1) ?? NaN)}` : "",
  ];
  for (const line of lines.filter(Boolean)) htmlNode("div", {}, tip, line);
  const box = node.querySelector(".mark").getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(4, Math.min(box.right + 10, room)) + window.scrollX}px`;
  tip.style.top = `${box.bottom + 8 + window.scrollY}px`;
}

function showRows() {
  const table = at("rows");
  table.replaceChildren();
  const names = ["plan", "peak", "temporaries", "runtime peak", "step", "recomputed", ""];
  const head = htmlNode("tr", {}, htmlNode("thead", {}, table));
  for (const name of names) htmlNode("th", { scope: "col" }, head, name);
  const body = htmlNode("tbody", {}, table);
  for (const point of group.points) {
    const row = htmlNode("tr", {}, body);
    const sizes = [point.peak_bytes, point.temp_bytes, point.runtime_bytes];
    const texts = sizes.map((size) => (size === null ? "–" : bytesText(size)));
    const again = point.recomputed === null ? "–" : `${(100 * point.recomputed).toFixed(1)} %`;
    for (const text of [point.plan, ...texts, secondsText(point.step_seconds) + spreadText(point), again]) {
      htmlNode("td", {}, row, text);
    }
    const button = htmlNode("button", { type: "button" }, htmlNode("td", {}, row), "copy command");
    button.addEventListener("click", () => copy(point.command));
  }
}

start();
