// The player of `swim explain`: maps from bytes, drawn over the frame that plays. No library, no request.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const video = $("video");
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const HEAT = bytes(data.heat);
const SVG = "http://www.w3.org/2000/svg";

for (const view of data.views) {
  view.cells = bytes(view.cells);
  view.highest = floats(view.highest);
  view.numCells = view.grid[1] * view.grid[2];
  view.planes = 2 + view.heads.length;
  view.entries = view.highest.length / (view.layers.length * view.planes * view.grid[0]);
  for (const id in view.coverage) view.coverage[id] = view.coverage[id].map((step) => step && bytes(step));
}
for (const thing of data.objects) thing.frames = Object.keys(thing.masks).map(Number).sort((a, b) => a - b);

// ---- what is chosen

const state = { text: 0, word: firstWord() };

function firstWord() {
  const words = data.views[0].words[0];
  const noun = words.findIndex((word) => word.noun && word.entry !== null);
  return noun >= 0 ? noun : Math.max(0, words.findIndex((word) => word.entry !== null));
}

// Offsets count characters, as in Python; a string here counts some of them (emoji) twice.
const cut = (text, word) => [...text].slice(word.start, word.end).join("");
const spelled = (text, word) => cut(text, word).toLowerCase();
const asText = (number) => (number ? data.views[number - 1].answer : data.prompt);
const wordsOf = (number) => (number ? data.views[number - 1].words[1] : data.views[0].words[0]);
const chosenWord = () => wordsOf(state.text)[state.word];

// The chosen word as a model has it: its own prompt, its own answer, or the same word in its answer; null without one.
function ownWord(view) {
  if (state.text === 0) return view.words[0][state.word];
  if (data.views[state.text - 1] === view) return view.words[1][state.word];
  const wanted = spelled(asText(state.text), chosenWord());
  return view.words[1].find((word) => spelled(view.answer, word) === wanted) ?? null;
}

function chosenLayers(view) {
  const value = $("layer").value;
  if (value === "all") return view.layers.map((_, place) => place);
  if (value === "own") return view.own.map((layer) => view.layers.indexOf(layer));
  return [view.layers.indexOf(Number(value))].filter((place) => place >= 0);
}

const chosenObject = () => data.objects.find((thing) => thing.id === $("object")?.value);

// ---- maps

// One plane as numbers [T * cells]; of one head within each step, renormalised there.
function plane(view, entry, layer, head, scope) {
  const steps = view.grid[0];
  const number = head === "mean" ? (scope === "step" ? 0 : 1) : 2 + view.heads.indexOf(Number(head));
  const first = ((layer * view.entries + entry) * view.planes + number) * steps;
  const map = new Float32Array(steps * view.numCells);
  for (let t = 0; t < steps; t++) {
    let total = 0;
    for (let i = 0; i < view.numCells; i++) {
      const share = view.cells[(first + t) * view.numCells + i] / 255;
      total += map[t * view.numCells + i] = share * share * view.highest[first + t];
    }
    if (head !== "mean" && scope === "step" && total > 0)
      for (let i = 0; i < view.numCells; i++) map[t * view.numCells + i] /= total;
  }
  return map;
}

// The map on screen of an entry: mean over the chosen layers, without what all words share if that is asked for.
function mapOf(view, word) {
  const layers = chosenLayers(view), head = $("head").value, scope = $("scope").value;
  const missing = head !== "mean" && !view.heads.includes(Number(head));
  if (!word || word.entry === null || !layers.length || missing) return null;
  const map = new Float32Array(view.grid[0] * view.numCells);
  const add = (entry, sign) => {
    for (const layer of layers)
      plane(view, entry, layer, head, scope).forEach((value, i) => (map[i] += (sign * value) / layers.length));
  };
  add(word.entry, 1);
  if ($("sinks").checked) {
    add(view.entries - 1, -1);
    map.forEach((value, i) => (map[i] = Math.max(0, value)));
  }
  return map;
}

const uniformOf = (view, word) => ($("scope").value === "step" ? 1 / view.numCells : 1 / word.keys);

function stepAt(view, frame) {
  const distance = (step) => Math.min(...step.map((other) => Math.abs(other - frame)));
  return view.frames.reduce((best, step, t) => (distance(step) < distance(view.frames[best]) ? t : best), 0);
}

// ---- drawing

let shown = []; // per model: word, map, uniform
let scaleTop = 1;

function prepare() {
  shown = data.views.map((view) => {
    const word = ownWord(view), map = mapOf(view, word);
    return { view, word, map, uniform: map ? uniformOf(view, word) : 0 };
  });
  const sinks = $("sinks").checked;
  scaleTop = Math.max(...shown.flatMap((one) => [one.map ? one.map.reduce((a, b) => Math.max(a, b), 0) : 0, sinks ? 0 : one.uniform])) || 1;
  document.querySelectorAll("button.word").forEach((button) => {
    const chosen = Number(button.dataset.text) === state.text && Number(button.dataset.word) === state.word;
    button.setAttribute("aria-pressed", chosen);
  });
  drawBar(sinks);
  drawCurve();
  drawFrame();
}

const colourAt = (share) => 4 * Math.round(255 * Math.min(1, Math.sqrt(share)));
const frameAt = (seconds) => Math.min(data.film.frames - 1, Math.floor(seconds * data.film.fps + 0.01));
const goTo = (frame) => (video.currentTime = (frame + 0.5) / data.film.fps);

// `seconds` of the frame on screen, where the browser says it.
function drawFrame(seconds = video.currentTime) {
  const frame = frameAt(seconds);
  $("now").textContent = `frame ${frame}, ${(frame / data.film.fps).toFixed(2)} s`;
  $("seek").value = frame;
  $("play").textContent = video.paused ? "Play" : "Pause";
  shown.forEach((one, number) => {
    const figure = document.querySelector(`figure[data-view="${number}"]`);
    const [picture, heat, outline] = figure.querySelectorAll("canvas");
    for (const canvas of [picture, heat, outline]) size(canvas);
    if (video.readyState >= 2) picture.getContext("2d").drawImage(video, 0, 0, picture.width, picture.height);
    picture.classList.toggle("dim", $("heat").checked);
    const step = stepAt(one.view, frame);
    drawHeat(heat, one, step);
    const seen = drawOutline(outline, frame);
    figure.querySelector(".now").textContent = caption(one, step) + seen;
  });
  const cursor = $("curve").querySelector(".cursor");
  if (cursor) for (const end of ["x1", "x2"]) cursor.setAttribute(end, timeX(frame / data.film.fps));
}

function size(canvas) {
  const scale = Math.max(1, Math.ceil(640 / data.film.width));
  const width = data.film.width * scale, height = data.film.height * scale;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

function drawHeat(canvas, { view, map }, step) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!map || !$("heat").checked) return;
  const [, rows, columns] = view.grid;
  for (let i = 0; i < view.numCells; i++) {
    const row = Math.floor(i / columns), column = i % columns;
    const [x0, x1] = [column, column + 1].map((x) => Math.round((x * canvas.width) / columns));
    const [y0, y1] = [row, row + 1].map((y) => Math.round((y * canvas.height) / rows));
    const at = colourAt(map[step * view.numCells + i] / scaleTop);
    context.fillStyle = `rgba(${HEAT[at]}, ${HEAT[at + 1]}, ${HEAT[at + 2]}, ${HEAT[at + 3] / 255})`;
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
  }
}

function caption({ view, word, map }, step) {
  if (!word) return "its answer has no such word";
  if (word.entry === null) return "this word was not kept";
  if (!map) return "this layer or head was not kept";
  const value = curveOf({ view, word, map })[step];
  const frames = [...new Set(view.frames[step])].join(", ");
  const said = value === null ? "" : chosenObject() ? `, mass ${value.toFixed(2)}` : `, ${value.toPrecision(2)}`;
  return `step ${step + 1} of ${view.grid[0]} (frames ${frames})${said}`;
}

// ---- the object

const outlines = new Map();

// The annotated frame nearest to one that plays, at most half a usual distance between annotations away; else null.
function annotatedAt(thing, frame) {
  if (!thing.frames.length) return null;
  const gaps = thing.frames.slice(1).map((other, i) => other - thing.frames[i]).sort((a, b) => a - b);
  const reach = gaps.length ? gaps[Math.floor(gaps.length / 2)] / 2 : 0.5;
  const nearest = thing.frames.reduce((a, b) => (Math.abs(b - frame) < Math.abs(a - frame) ? b : a));
  return Math.abs(nearest - frame) <= reach ? nearest : null;
}

function drawOutline(canvas, frame) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const thing = chosenObject();
  if (!thing) return "";
  const at = annotatedAt(thing, frame);
  if (at === null) return "; no mask near this frame";
  if (!thing.masks[at]) return "; object absent";
  if (!$("outline").checked) return "";
  const key = `${thing.id} ${at}`;
  if (!outlines.has(key)) outlines.set(key, outlineOf(thing.masks[at], canvas));
  context.lineJoin = context.lineCap = "round";
  for (const [colour, width] of [["black", 3.6], ["white", 1.6]]) {
    context.strokeStyle = colour;
    context.lineWidth = (width * canvas.width) / (canvas.clientWidth || canvas.width);
    context.stroke(outlines.get(key));
  }
  return "";
}

// Run lengths of a COCO string: 5 bits a character, from the fourth number on as differences to the last but one.
function runsOf(text) {
  const runs = [];
  for (let at = 0; at < text.length; ) {
    let value = 0, place = 0, code;
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << (5 * place++);
    } while (code & 32);
    if (code & 16 && 5 * place < 32) value |= -1 << (5 * place);
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

function outlineOf(mask, canvas) {
  const [height, width] = mask.size;
  const inside = new Uint8Array(height * width); // column by column, as the runs go
  let at = 0, filled = 0;
  for (const run of runsOf(mask.counts)) {
    if (filled) inside.fill(1, at, at + run);
    at += run;
    filled = 1 - filled;
  }
  const path = new Path2D(), sx = canvas.width / width, sy = canvas.height / height;
  const is = (x, y) => x >= 0 && y >= 0 && x < width && y < height && inside[x * height + y];
  const line = (x0, y0, x1, y1) => { path.moveTo(x0 * sx, y0 * sy); path.lineTo(x1 * sx, y1 * sy); };
  for (let x = 0; x < width; x++)
    for (let y = 0; y < height; y++) {
      if (!inside[x * height + y]) continue;
      if (!is(x - 1, y)) line(x, y, x, y + 1);
      if (!is(x + 1, y)) line(x + 1, y, x + 1, y + 1);
      if (!is(x, y - 1)) line(x, y, x + 1, y);
      if (!is(x, y + 1)) line(x, y + 1, x + 1, y + 1);
    }
  return path;
}

// ---- scale and curve

const short = (value) => (value === 0 ? "0" : value >= 0.001 ? String(Number(value.toPrecision(2))) : value.toExponential(1));

function drawBar(sinks) {
  const bar = $("bar"), canvas = bar.querySelector("canvas"), context = canvas.getContext("2d");
  bar.querySelectorAll("span").forEach((span) => span.remove());
  for (let x = 0; x < 256; x++) {
    const at = 4 * x, alpha = HEAT[at + 3] / 255; // as it looks on the grey of a frame
    const mixed = [0, 1, 2].map((c) => Math.round(HEAT[at + c] * alpha + 84 * (1 - alpha)));
    context.fillStyle = `rgb(${mixed})`;
    context.fillRect(x, 0, 1, 1);
  }
  const marks = sinks ? [] : [...new Set(shown.filter((one) => one.map).map((one) => one.uniform))];
  const places = marks.map((value) => Math.sqrt(value / scaleTop));
  const put = (place, text, kind) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.style.left = `${100 * place}%`;
    span.className = kind + (place < 0.12 ? " first" : place > 0.88 ? " last" : "");
    bar.append(span);
  };
  marks.forEach((value, i) => put(places[i], `uniform = ${short(value)}`, "mark"));
  if (!places.some((place) => place < 0.24)) put(0, "0", "");
  if (!places.some((place) => place > 0.76)) put(1, short(scaleTop), "");
  $("bar-title").textContent = sinks
    ? "Attention on a cell, above what all words share"
    : $("scope").value === "step" ? "Share of a step’s attention on a cell" : "Share of all the word’s attention on a cell";
}

// Mass in the mask, or peak over uniform, or sum, for each step; null where there is none.
function curveOf({ view, word, map }) {
  const thing = chosenObject();
  return view.frames.map((_, t) => {
    const cells = map.subarray(t * view.numCells, (t + 1) * view.numCells);
    const total = cells.reduce((a, b) => a + b, 0);
    if (!thing) return $("scope").value === "step" ? Math.max(...cells) / uniformOf(view, word) : total;
    const coverage = view.coverage[thing.id][t];
    if (!coverage || !coverage.some(Boolean) || !total) return null;
    return cells.reduce((sum, value, i) => sum + (coverage[i] ? value : 0), 0) / total;
  });
}

function evenCurve({ view }) {
  const coverage = view.coverage[chosenObject().id];
  return coverage.map((step) => (step && step.some(Boolean) ? step.filter(Boolean).length / step.length : null));
}

const PLOT = { left: 42, right: 500, top: 10, bottom: 150 };
const timeX = (seconds) => PLOT.left + ((PLOT.right - PLOT.left) * seconds) / (data.film.frames / data.film.fps);

function drawCurve() {
  const svg = $("curve"), thing = chosenObject();
  svg.replaceChildren();
  PLOT.right = svg.clientWidth - 12;
  const curves = shown.filter((one) => one.map).map((one) => ({ ...one, values: curveOf(one) }));
  const most = thing ? 1 : Math.max(...curves.flatMap((one) => one.values), 1e-9);
  const y = (value) => PLOT.bottom - ((PLOT.bottom - PLOT.top) * value) / most;
  const add = (kind, attributes, text) => {
    const node = document.createElementNS(SVG, kind);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  for (const share of [0, 0.5, 1]) {
    add("line", { class: "axis", x1: PLOT.left, x2: PLOT.right, y1: y(share * most), y2: y(share * most) });
    add("text", { x: PLOT.left - 8, y: y(share * most) + 4, "text-anchor": "end" }, short(share * most));
  }
  const seconds = data.film.frames / data.film.fps;
  add("text", { x: PLOT.left, y: PLOT.bottom + 20, "text-anchor": "middle" }, "0 s");
  add("text", { x: PLOT.right, y: PLOT.bottom + 20, "text-anchor": "end" }, `${short(seconds)} s`);
  const line = (view, values, attributes, dots) => {
    const points = values.map((value, t) => value === null ? null : [timeX(middle(view, t)), y(value)]);
    let path = "", drawing = false;
    for (const point of points) {
      path += point ? `${drawing ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}` : "";
      drawing = Boolean(point);
      if (point && dots) add("circle", { cx: point[0], cy: point[1], r: 3.5, fill: dots });
    }
    add("path", { d: path || "M0 0", fill: "none", ...attributes });
  };
  if (thing && curves.length) line(curves[0].view, evenCurve(curves[0]), { class: "even" });
  for (const one of curves) {
    const colour = data.colours[data.views.indexOf(one.view)];
    line(one.view, one.values, { stroke: colour, "stroke-width": 2 }, colour);
  }
  add("line", { class: "cursor", y1: PLOT.top, y2: PLOT.bottom, x1: 0, x2: 0 });
  $("curve-title").textContent = thing
    ? `Share of the map on “${thing.label}” (dashed: uniform)`
    : $("scope").value === "step" ? "Highest cell of a step, as a multiple of uniform" : "Share of the word’s attention on a step";
}

// Seconds at the middle of a step's sampled frames.
function middle(view, step) {
  const frames = view.frames[step];
  return (frames[0] + frames[frames.length - 1] + 1) / 2 / data.film.fps;
}

// ---- choices and events

function option(select, value, text) {
  const node = document.createElement("option");
  [node.value, node.textContent] = [value, text];
  select.append(node);
}

function fillChoices() {
  const layers = [...new Set(data.views.flatMap((view) => view.layers))].sort((a, b) => a - b);
  const own = [...new Set(data.views.flatMap((view) => view.own))].sort((a, b) => a - b);
  if (own.length) option($("layer"), "own", `mean of the run’s (${own.join(", ")})`);
  option($("layer"), "all", layers.length > 1 ? `mean of all ${layers.length} kept` : "the one kept");
  for (const layer of layers) option($("layer"), layer, `layer ${layer}`);
  option($("head"), "mean", "mean of heads");
  for (const head of [...new Set(data.views.flatMap((view) => view.heads))].sort((a, b) => a - b)) option($("head"), head, `head ${head}`);
  if (!$("object")) return;
  for (const thing of data.objects) option($("object"), thing.id, thing.label);
  option($("object"), "", "none");
}

// The object that the word names, if one does: the word stands in its label.
function followWord() {
  const wanted = spelled(asText(state.text), chosenWord());
  const named = data.objects.find((thing) => thing.label.toLowerCase().split(/\s+/).includes(wanted));
  if (named) $("object").value = named.id;
}

function save() {
  const word = chosenWord(), text = cut(asText(state.text), word);
  const models = shown.filter((one) => one.word && one.word.entry !== null).map(({ view, word: own }) => ({
    name: view.name, answer: view.answer, grid: view.grid, frames: view.frames, provenance: view.provenance,
    layers: Object.fromEntries(view.layers.map((layer, place) => [layer, Object.fromEntries(
      ["mean_within_step", "mean", ...view.heads.map((head) => `head_${head}`)].map((name, number) =>
        [name, nested(view, own.entry, place, number)]))])),
  }));
  const content = JSON.stringify({ word: text, prompt: data.prompt, precision: "8-bit square roots of each step's highest cell", models });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `cells_${text.replace(/[^\w-]+/g, "_")}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function nested(view, entry, layer, number) {
  const [, rows, columns] = view.grid;
  const head = number > 1 ? String(view.heads[number - 2]) : "mean";
  const map = plane(view, entry, layer, head, number === 0 ? "step" : "all");
  return view.frames.map((_, t) => Array.from({ length: rows }, (_, y) =>
    Array.from({ length: columns }, (_, x) => Number(map[(t * rows + y) * columns + x].toPrecision(4)))));
}

fillChoices();
if (data.objects.length) followWord();
document.querySelectorAll("button.word").forEach((button) =>
  button.addEventListener("click", () => {
    [state.text, state.word] = [Number(button.dataset.text), Number(button.dataset.word)];
    if (data.objects.length) followWord();
    prepare();
  }));
for (const id of ["scope", "layer", "head", "sinks", "object", "outline", "heat"]) $(id)?.addEventListener("change", prepare);
$("speed").addEventListener("change", () => (video.playbackRate = Number($("speed").value)));
$("get").addEventListener("click", save);
$("curve").addEventListener("click", (event) => {
  const share = (event.clientX - $("curve").getBoundingClientRect().left - PLOT.left) / (PLOT.right - PLOT.left);
  goTo(Math.floor(Math.min(Math.max(share, 0), 0.999) * data.film.frames));
});
$("play").addEventListener("click", () => (video.paused ? video.play() : video.pause()));
$("seek").addEventListener("input", () => goTo(Number($("seek").value)));
for (const name of ["loadeddata", "seeked", "pause", "play"]) video.addEventListener(name, () => drawFrame());
window.addEventListener("resize", prepare);
if (video.requestVideoFrameCallback) {
  const again = (_, now) => { drawFrame(now.mediaTime); video.requestVideoFrameCallback(again); };
  video.requestVideoFrameCallback(again);
} else {
  video.addEventListener("timeupdate", () => drawFrame());
}
prepare();
