"use strict";
// Draws the charts. Arrays come as base64; colours come from the style sheet, so that themes are described once.
const decode = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
const data = JSON.parse(document.getElementById("data").textContent, (_, value) =>
  value?.f4 !== undefined ? new Float32Array(decode(value.f4)) : value?.f8 !== undefined ? new Float64Array(decode(value.f8)) : value);
const root = document.documentElement;
const several = data.runs.length > 1;
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = []; // {node, traces(), layout(), steps: whether x is the step}
let frame = data.frames.length - 1;

// Plotly reads some HTML and %{...} in texts; of a run's own texts nothing is read so.
const plain = (text) => text.replace(/[&<>%]/g, (char) => `&#${char.charCodeAt(0)};`);
const label = (run, text) => several ? `${plain(run.name)}: ${text}` : text;

const probe = document.body.appendChild(document.createElement("i"));
function colour(name, alpha = 1) {
  probe.style.color = `var(--${name})`;
  const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g);
  return `rgba(${r},${g},${b},${alpha})`;
}
const ofRun = (n, alpha) => colour(`c${n % 6}`, alpha);
const dash = (n) => ["solid", "dash", "dot", "dashdot"][Math.floor(n / 6) % 4];

// A line through the values; through the smallest and the largest of each bucket if there are buckets.
function line(x, low, high, { color, width = 1.5, template, dash = "solid" }) {
  const n = high ? 2 : 1, X = new Float64Array(n * x.length), Y = new Float64Array(n * x.length);
  x.forEach((step, i) => {
    X[n * i] = step; Y[n * i] = low[i];
    if (high) { X[n * i + 1] = step; Y[n * i + 1] = high[i]; }
  });
  const trace = { x: X, y: Y, mode: "lines", line: { color, width, dash }, showlegend: false };
  const alone = Array.from(Y, (y, i) => Number.isFinite(y) && !Number.isFinite(Y[i - 1]) && !Number.isFinite(Y[i + 1]));
  if (alone.some(Boolean)) {
    trace.mode = "lines+markers";
    trace.marker = { color, size: alone.map((is) => is ? 5 : 0) };
  }
  if (high) trace.customdata = Array.from(Y, (_, i) => [low[i >> 1], high[i >> 1]]);
  const value = high ? "%{customdata[0]:.3~g} to %{customdata[1]:.3~g}" : "%{y:.3~g}";
  trace.hovertemplate = `${template.replace("VALUE", value)}<extra></extra>`;
  return trace;
}

function marks(x, texts, { color, symbol, y }) {
  return { x, y: x.map(() => y), text: texts, yaxis: "y2", mode: "markers", marker: { color, symbol, size: 8 }, cliponaxis: false, hovertemplate: "%{text}<extra></extra>", showlegend: false };
}
const alarms = (run, n) => marks(run.alarms.map((alarm) => alarm.x), run.alarms.map((alarm) => alarm.lines.map((text) => label(run, plain(text))).join("<br>")),
  { color: several ? ofRun(n) : colour("c1"), symbol: "triangle-down", y: 1 });

function base(xaxis, yaxis) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, tickfont: { size: 11 }, title: { font: { size: 12 }, standoff: 6 } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("soft"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 46, r: 12, t: 12, b: 38 }, dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", uirevision: 1,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 }, align: "left", namelength: -1 },
    xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...xaxis.title } }, yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis.title } },
  };
}
const ends = data.runs.flatMap((run) => Object.values(run.series).flatMap(({ x }) => [x[0], x.at(-1)]));
const [begin, end] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
const span = [begin - 0.01 * Math.max(end - begin, 50), end + 0.01 * Math.max(end - begin, 50)];
function overSteps(yaxis, hovermode) {
  const unified = hovermode === "x unified";
  const xaxis = { title: { text: "step" }, range: [...span], tickformat: ",d", hoverformat: ",d", ...(unified && { unifiedhovertitle: { text: "step %{x}" } }) };
  const layout = base(xaxis, { nticks: 6, tickformat: "~g", ...yaxis });
  layout.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
  return { ...layout, hovermode, hoverdistance: 30 };
}

function scalarChart({ name, log }) {
  const ranks = name === "participation_ratio" ? [["effective_rank", "effective rank", "circle-open"], ["rankme", "RankMe", "square-open"]] : [];
  const traces = () => data.runs.flatMap((run, n) => {
    const of = run.series[name];
    const found = of ? [line(of.x, of.low, of.high, { color: ofRun(n), dash: dash(n), template: label(run, `${name.replace("participation_", "participation ")} VALUE`) })] : [];
    for (const [key, words, symbol] of ranks) if (run.ranks[key])
      found.push({ x: run.plane.steps, y: run.ranks[key], mode: "lines+markers", line: { color: ofRun(n, 0.5), width: 1 }, marker: { symbol, size: 5, color: ofRun(n), maxdisplayed: 25 }, hovertemplate: label(run, `${words} %{y:.3~g}<extra></extra>`), showlegend: false });
    return [...found, alarms(run, n)];
  });
  const sizes = data.runs.flatMap(({ series }) => series[name] ? [...series[name].low, ...(series[name].high ?? [])] : []).filter((size) => size > 0);
  const [least, most] = sizes.reduce(([a, b], size) => [Math.min(a, size), Math.max(b, size)], [Infinity, 0]);
  return { node: document.getElementById(`chart-${name}`), steps: true, traces, layout: () => overSteps(log && most > 0 ? { type: "log", nticks: most > 100 * least ? 5 : 3 } : { rangemode: "tozero" }, "x unified") };
}

function componentChart(node) {
  const n = Number(node.dataset.run), of = node.dataset.of, run = data.runs[n], parts = run.components;
  const traces = () => {
    const lines = parts.k.map((k, i) => {
      const place = run.noted.indexOf(k);
      const look = place < 0 ? { color: colour("grey", parts.k.length > 16 ? 0.25 : 0.45), width: 1 } : { color: colour(`c${(place + 1) % 6}`), width: 1.8 };
      return line(parts.x, parts[of][i], parts[`${of}_high`]?.[i], { ...look, template: `component ${k}, step %{x}<br>${of === "pi" ? "pi" : "share"} VALUE` });
    });
    const moved = marks(parts.moved.x, parts.moved.count.map((count, i) => `step ${parts.moved.x[i].toLocaleString("en")}: ${count} relocated`), { color: colour("soft"), symbol: "triangle-up", y: 0 });
    return [...lines.reverse(), moved, alarms(run, n)];
  };
  return { node, steps: true, traces, layout: () => overSteps({ rangemode: "tozero" }, "closest") };
}

const CIRCLE = Array.from({ length: 49 }, (_, i) => [2 * Math.cos(i / 24 * Math.PI), 2 * Math.sin(i / 24 * Math.PI)]);
const frameOf = (plane) => Math.max(plane.steps.findLastIndex((step) => step <= data.frames[frame]), 0);
function ellipses(plane, at, ks) {
  const x = [], y = [];
  for (const k of ks) {
    const i = at * plane.K + k, [a, b, c] = plane.covariance.subarray(3 * i, 3 * i + 3);
    const l = Math.sqrt(Math.max(a, 0)), m = l > 0 ? b / l : 0, r = Math.sqrt(Math.max(c - m * m, 0));
    for (const [u, v] of CIRCLE) { x.push(plane.mean[2 * i] + l * u); y.push(plane.mean[2 * i + 1] + m * u + r * v); }
    x.push(null); y.push(null);
  }
  return { x, y };
}
// The numbers of components at their means: a few, and none over another.
function numbers(plane, at, noted) {
  const text = Array(plane.K).fill(""), taken = [], mean = (k) => plane.mean.subarray(2 * (at * plane.K + k), 2 * (at * plane.K + k) + 2);
  for (const k of [...noted.filter((k) => k < plane.K), ...(plane.K > 20 ? [] : text.keys())]) {
    const [x, y] = mean(k);
    if (taken.some(([u, v]) => Math.hypot(x - u, y - v) < 0.13 * reach)) continue;
    text[k] = String(k);
    taken.push([x, y]);
  }
  return text;
}
// The same axes for all runs and all steps, so that what moves or shrinks is seen to.
const reach = 1.04 * Math.max(...data.runs.filter((run) => run.plane).map(({ plane }) => plane.mean.reduce((most, mean, i) => {
  const size = Math.abs(mean) + 2 * Math.sqrt(Math.max(plane.covariance[3 * (i >> 1) + 2 * (i & 1)], 0));
  return size > most ? size : most;
}, 0)), 1e-6);

function planeChart(node) {
  const run = data.runs[Number(node.dataset.run)], plane = run.plane, all = Array.from({ length: plane.K }, (_, k) => k);
  const traces = () => {
    const at = frameOf(plane), of = (k) => colour(`c${(run.noted.indexOf(k) + 1) % 6}`), rest = colour("grey");
    const outline = (ks, color) => ({ ...ellipses(plane, at, ks), mode: "lines", line: { color, width: ks.length > 1 ? 1 : 1.8 }, hoverinfo: "skip", showlegend: false });
    const means = { x: [], y: [], text: numbers(plane, at, run.noted), customdata: [], mode: "markers+text", textposition: "top center", cliponaxis: true,
      textfont: { size: 11, color: colour("ink") }, marker: { size: [], color: all.map((k) => run.noted.includes(k) ? of(k) : rest) }, hovertemplate: "component %{customdata[0]}<br>pi %{customdata[1]:.3~g}<extra></extra>", showlegend: false };
    for (const k of all) {
      const i = at * plane.K + k;
      means.x.push(plane.mean[2 * i]); means.y.push(plane.mean[2 * i + 1]);
      means.customdata.push([k, plane.pi[i]]);
      means.marker.size.push(3 + 7 * Math.min(Math.sqrt(plane.pi[i] * plane.K), 2));
    }
    return [outline(all.filter((k) => !run.noted.includes(k)), rest), ...run.noted.filter((k) => k < plane.K).map((k) => outline([k], of(k))), means];
  };
  const layout = () => ({ ...base({ title: { text: "first direction" }, range: [-reach, reach], constrain: "domain" }, { title: { text: "second direction" }, range: [-reach, reach], scaleanchor: "x", constrain: "domain" }), hovermode: "closest" });
  return { node, slides: true, traces, layout };
}

function spectraChart(node) {
  const planes = data.runs.filter((run) => run.plane).map((run) => run.plane);
  const values = planes.flatMap((plane) => [plane.T.value, plane.B.value]);
  const most = Math.max(...values.map((value) => value.reduce((a, b) => b > a ? b : a, 0)), 1e-30);
  const isKept = (size) => size > 1e-6 * most; // below is rounding
  const least = Math.min(...values.map((value) => value.reduce((a, b) => isKept(b) && b < a ? b : a, most)));
  const traces = () => data.runs.flatMap((run, n) => !run.plane ? [] : [["T", "circle", "solid"], ["B", "square-open", "dot"]].map(([name, symbol, dash]) => {
    const { rank, value } = run.plane[name], at = frameOf(run.plane) * rank.length;
    const y = Array.from(value.subarray(at, at + rank.length), (size) => isKept(size) ? size : null);
    return { x: rank, y, mode: "lines+markers", line: { color: ofRun(n), width: 1, dash }, marker: { symbol, size: 6, color: ofRun(n) }, hovertemplate: label(run, `eigenvalue %{x} of ${name}: %{y:.3~g}<extra></extra>`), showlegend: false };
  }));
  const widest = Math.max(...planes.map((plane) => plane.T.rank.at(-1)));
  const layout = () => ({ ...base({ title: { text: "rank of the eigenvalue" }, type: widest > 64 ? "log" : "linear", tickformat: "~g" }, { title: { text: "variance" }, type: "log", range: [Math.log10(least) - 0.2, Math.log10(most) + 0.2], nticks: 4, tickformat: "~g" }), hovermode: "closest" });
  return { node, slides: true, traces, layout };
}

const draw = (chart) => Plotly.react(chart.node, chart.traces(), chart.layout(), { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false });
const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
function paint() {
  document.getElementById("theme").textContent = isDark() ? "Light" : "Dark";
  charts.forEach(draw);
}

// A zoom in one chart over steps is a zoom in all of them.
let following = false;
const isWhole = ([from, to]) => from === span[0] && to === span[1];
async function follow(from, event) {
  const range = event["xaxis.range"] ?? (event["xaxis.range[0]"] !== undefined ? [event["xaxis.range[0]"], event["xaxis.range[1]"]] : null);
  if (following || !range) return;
  following = true;
  await Promise.all(charts.filter((chart) => chart.steps && chart !== from).map((chart) =>
    Plotly.relayout(chart.node, { "xaxis.range": [...range], ...(isWhole(range) && { "yaxis.autorange": true }) })));
  following = false;
}

for (const chart of data.charts) charts.push(scalarChart(chart));
for (const node of document.querySelectorAll("[data-of=pi], [data-of=share]")) charts.push(componentChart(node));
for (const node of document.querySelectorAll("[data-of=plane]")) charts.push(planeChart(node));
if (data.frames.length) charts.push(spectraChart(document.getElementById("spectra")));
paint();
for (const chart of charts) if (chart.steps) chart.node.on("plotly_relayout", (event) => follow(chart, event));
dark.addEventListener("change", paint);
document.getElementById("theme").addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; paint(); });
let waiting = false;
document.getElementById("frame")?.addEventListener("input", (event) => {
  frame = Number(event.target.value);
  document.getElementById("frame-step").textContent = data.frames[frame].toLocaleString("en");
  if (!waiting) requestAnimationFrame(() => { waiting = false; charts.filter((chart) => chart.slides).forEach(draw); });
  waiting = true;
});
