// SPDX-License-Identifier: Apache-2.0
// The page: fetches /state.json once a second and draws it. Text that a guest chose, such as its
// name, becomes text content of a node, never markup.
import { ExtentMap, LAYERS, cellAt, colour, drawMap, scaled } from "./cowshed-map.js";

const POLL_MS = 1000;
const PATIENCE_MS = 10000;
const NR_SAMPLES = 180;
const LEAST_SAMPLES = 30; // the scale of a line with fewer samples
const STOPPED = "stopped-quota";

const $ = (id) => document.getElementById(id);
const history = { hit: [], faults: [], loads: [] };
const images = new Map(); // by key: its nodes, its status, its map
let newest = null;
let before = null;
let layer = "resident";
let answeredAt = 0;
let failure = "";

// ---- words

function bytes(count) {
  const units = ["", "K", "M", "G", "T", "P"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit++;
  }
  return `${Number(count.toPrecision(3))}${units[unit]}`;
}

// An offset in an image, exact to the extent: 19.25M.
function place(offset) {
  for (const [unit, size] of [["G", 2 ** 30], ["M", 2 ** 20], ["K", 2 ** 10]]) {
    if (offset >= size) return `${Number((offset / size).toFixed(unit === "G" ? 5 : 3))}${unit}`;
  }
  return String(offset);
}

function share(part, whole) {
  if (!whole || part === undefined) return "–";
  const percent = (100 * part) / whole;
  if (percent > 0 && percent < 0.1) return "<0.1%";
  if (percent > 99.9 && percent < 100) return ">99.9%";
  return `${Number(percent.toFixed(1))}%`;
}

function count(number) {
  return Math.round(number).toLocaleString("en");
}

function rate(value) {
  if (value === null) return "–";
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

function microseconds(us) {
  if (us < 999.5) return `${Number(us.toPrecision(3))} µs`;
  if (us < 999500) return `${Number((us / 1000).toPrecision(3))} ms`;
  return `${Number((us / 1e6).toPrecision(3))} s`;
}

function seconds(length) {
  const whole = Math.floor(length);
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h ${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d ${two(Math.floor((whole % 86400) / 3600))}h`;
}

// The unique key of a guest or image, and its label, which has the domain unless that is the default.
const keyOf = (one) => `${one.domain}/${one.name}`;
const labelOf = (one, name = one.name) => (one.domain === "default" ? name : `${one.domain}/${name}`);

function node(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// ---- rates

// A counter's growth per second between the two newest states; null if unknown.
function growth(newer, older, key) {
  if (!newer || !older) return null;
  return Math.max(0, newer[key] - older[key]) / (newest.uptime_seconds - before.uptime_seconds);
}

function observe(state) {
  if (newest && state.pid === newest.pid && state.uptime_seconds === newest.uptime_seconds) return;
  const restarted = newest && (state.pid !== newest.pid || state.uptime_seconds < newest.uptime_seconds);
  before = restarted ? null : newest;
  newest = state;
  state.guestsByKey = new Map(state.guests.map((guest) => [keyOf(guest), guest]));
  if (restarted) for (const samples of Object.values(history)) samples.length = 0;
  if (!before) return;
  const faults = growth(state, before, "hits") + growth(state, before, "misses");
  remember(history.hit, useWithin(state, 60)?.hit_rate?.value ?? null);
  remember(history.faults, faults);
  remember(history.loads, growth(state, before, "loads"));
}

const useWithin = (state, window) => state.use.find((use) => use.window_seconds === window);

// What is estimated of the last minute, with its bounds.
function describeUse(state) {
  const { hit_rate: rate, working_set_bytes: used } = useWithin(state, 60) ?? {};
  const parts = [rate ? `${share(rate.low, 1)} to ${share(rate.high, 1)}, estimated over a minute` : unknown(state)];
  if (used) parts.push(`working set ${bytes(used.low)} to ${bytes(used.high)}`);
  return parts.join("; ");
}

const unknown = (state) => `unknown: ${state.use_unknown_because}`;

function remember(samples, value) {
  samples.push(value);
  if (samples.length > NR_SAMPLES) samples.shift();
}

const last = (samples) => (samples.length ? samples[samples.length - 1] : null);

// ---- drawing

function drawSpark(canvas, samples, most) {
  const width = canvas.clientWidth || 180;
  const height = 32;
  const pen = scaled(canvas, width, height);
  const step = width / (Math.max(LEAST_SAMPLES, samples.length) - 1);
  const start = width - (samples.length - 1) * step;
  const top = most || Math.max(1, ...samples.map((value) => value ?? 0));
  pen.strokeStyle = colour("--accent");
  pen.fillStyle = colour("--accent-soft");
  pen.lineWidth = 1.5;
  let from = null; // where the current stretch without gaps begins
  const path = new Path2D();
  const finish = (x) => {
    if (from === null) return;
    const area = new Path2D(path);
    area.lineTo(x, height);
    area.lineTo(from, height);
    pen.fill(area);
    from = null;
  };
  samples.forEach((value, no) => {
    const x = start + no * step;
    if (value === null) return finish(x - step);
    const y = height - 1 - (value / top) * (height - 3);
    if (from === null) {
      path.moveTo(x, y);
      from = x;
    } else path.lineTo(x, y);
  });
  finish(width);
  pen.stroke(path);
}

// The hit rate against the capacity, from half of it to twice as much, on a scale of doublings.
function drawCurve(canvas, at) {
  const width = canvas.clientWidth || 180;
  const height = 32;
  const pen = scaled(canvas, width, height);
  const points = Object.entries(at)
    .map(([factor, hit]) => [4 + ((Math.log2(factor) + 1) / 2) * (width - 8), height - 4 - hit * (height - 8)])
    .sort((one, other) => one[0] - other[0]);
  pen.strokeStyle = colour("--accent");
  pen.lineWidth = 1.5;
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.stroke();
  pen.fillStyle = colour("--accent");
  for (const [x, y] of points) pen.fillRect(x - 2.5, y - 2.5, 5, 5);
}

function drawWouldHelp(state) {
  const at = useWithin(state, 300)?.hit_rate_at ?? {};
  const known = (factor) => (factor in at ? share(at[factor], 1) : "–");
  $("hit-double").textContent = known("2");
  $("curve-note").textContent = Object.keys(at).length
    ? `hit rate; ${known("1")} with today's, ${known("0.5")} with half (estimated, 5 minutes)`
    : `hit rate ${unknown(state)}`;
  drawCurve($("curve"), at);
}

function drawTotals(state) {
  $("about").textContent =
    `${state.version}, pid ${state.pid}, up ${seconds(state.uptime_seconds)}, ${state.run_dir}`;
  $("resident").textContent = bytes(state.resident_bytes);
  $("resident-bar").style.width = `${(100 * state.resident_bytes) / state.capacity_bytes}%`;
  $("capacity").textContent =
    `${share(state.resident_bytes, state.capacity_bytes)} of ${bytes(state.capacity_bytes)}`;
  $("saved").textContent = bytes(state.saved_bytes);
  $("hit-rate").textContent = share(useWithin(state, 60)?.hit_rate?.value, 1);
  $("hit-all").textContent = describeUse(state);
  drawWouldHelp(state);
  $("faults").textContent = rate(last(history.faults));
  $("copies").textContent = `${rate(growth(state, before, "cow_breaks"))} copies a second`;
  $("loads").textContent = rate(last(history.loads));
  $("evictions").textContent =
    `${rate(growth(state, before, "evicted_extents"))} evictions a second, ${count(state.load_errors)} loads failed`;
  drawSpark($("hit-spark"), history.hit, 1);
  drawSpark($("fault-spark"), history.faults);
  drawSpark($("load-spark"), history.loads);
  $("latency").tBodies[0].replaceChildren(
    ...Object.entries(state.latency_us).map(([kind, latency]) => {
      const row = node("tr");
      const times = latency.count ? [latency.p50, latency.p99].map(microseconds) : ["–", "–"];
      row.append(node("td", kind), ...times.map((time) => node("td", time)));
      return row;
    }),
  );
}

function alertOf(what, why, cure) {
  const alert = node("p", "", "alert");
  alert.append(node("strong", what), ` ${why}`);
  if (cure) alert.append(node("br"), node("code", cure));
  return alert;
}

function drawAlerts(state) {
  const alerts = [];
  const stopped = state.guests.filter((guest) => guest.state === STOPPED);
  for (const guest of stopped.slice(0, 5)) {
    alerts.push(alertOf(
      `${labelOf(guest)} is stopped at its quota`,
      `of ${bytes(guest.quota_bytes)} for ${seconds(guest.stopped_seconds)} (${labelOf(guest, guest.image)}, pid ${guest.pid}).`,
      guest.cure,
    ));
  }
  if (state.nr_stopped > 5) alerts.push(alertOf(`${state.nr_stopped} guests are stopped`, "in all."));
  for (const image of state.images.filter((each) => each.source_changed)) {
    alerts.push(alertOf(
      `${labelOf(image)}: its source changed`,
      `after it was opened: restore ${image.source}, or restart the daemon.`,
    ));
  }
  if (state.drained) alerts.push(alertOf("Drain:", state.drained));
  $("alerts").replaceChildren(...alerts);
}

function imageNodes(name) {
  const box = node("article", "", "image");
  const title = node("div", "", "title");
  const about = node("span");
  const canvas = node("canvas", "", "map");
  const source = node("p", "", "note source");
  title.append(node("h3", name), about);
  canvas.setAttribute("role", "img");
  canvas.dataset.image = name;
  box.append(title, canvas, source);
  const entry = { box, about, canvas, source, status: null, map: null };
  canvas.addEventListener("pointermove", (event) => showTip(event, entry));
  canvas.addEventListener("pointerdown", (event) => showTip(event, entry));
  canvas.addEventListener("pointerleave", hideTip);
  return entry;
}

function drawImages(state) {
  const keys = state.images.map(keyOf);
  for (const [key, entry] of images) {
    if (!keys.includes(key)) {
      entry.box.remove();
      images.delete(key);
    }
  }
  for (const image of state.images) {
    const key = keyOf(image);
    if (!images.has(key)) {
      images.set(key, imageNodes(labelOf(image)));
      $("images").append(images.get(key).box);
    }
    const entry = images.get(key);
    entry.status = image;
    entry.map = image.map && new ExtentMap(image.map);
    entry.about.textContent =
      `${bytes(image.resident_bytes)} of ${bytes(image.size_bytes)} resident ` +
      `(${share(image.resident_bytes, image.size_bytes)}), ` +
      `hit rate ${share(useWithin(image, 60)?.hit_rate?.value, 1)}, ${bytes(image.saved_bytes)} saved, ` +
      `${bytes(image.pinned_bytes)} pinned, ${count(image.nr_guests)} guests` +
      (image.warming
        ? `, warming: ${bytes(image.warming.done_bytes)} of ${bytes(image.warming.total_bytes)}`
        : "");
    entry.source.textContent =
      `${image.source}, ${(image.digest || "digest not known yet").slice(0, 19)}, ` +
      (entry.map && entry.map.perCell > 1
        ? `a square is ${entry.map.perCell} extents of ${bytes(image.extent_bytes)}`
        : `a square is an extent of ${bytes(image.extent_bytes)}`);
    drawEntry(entry);
  }
}

function drawEntry({ canvas, map, status }) {
  if (!map) return;
  drawMap(canvas, map, layer);
  const counts = map.counts(layer);
  canvas.dataset.layer = layer;
  canvas.dataset.counts = JSON.stringify(counts);
  canvas.setAttribute("aria-label",
    `Extents of ${labelOf(status)} by ${layer}: ` +
    Object.entries(counts).filter(([, number]) => number).map(([name, number]) => `${number} ${name}`).join(", "));
}

function drawLegend() {
  const items = LAYERS[layer].map(([name, variable, words]) => legendItem(words, colour(variable), name));
  if (layer === "resident") items.push(legendItem("pinned", colour("--resident-4"), "pinned", true));
  $("legend").replaceChildren(...items);
}

function legendItem(words, fill, name, isPinned = false) {
  const item = node("li");
  const swatch = node("canvas");
  swatch.dataset.class = name;
  const pen = scaled(swatch, 12, 12);
  pen.fillStyle = fill;
  pen.fillRect(0, 0, 12, 12);
  if (isPinned) {
    pen.fillStyle = colour("--pin");
    pen.fillRect(4, 4, 4, 4);
  }
  item.append(swatch, words);
  return item;
}

function drawGuests(state) {
  $("guest-count").textContent =
    count(state.nr_guests) + (state.nr_stopped ? `, ${count(state.nr_stopped)} stopped` : "") +
    ["frozen", "parked", "away"].filter((how) => state.nr_by_state[how]).map((how) => `, ${count(state.nr_by_state[how])} ${how}`).join("");
  const rows = state.guests.map(guestRow);
  const left = state.nr_guests - state.guests.length;
  if (left > 0) rows.push(wideRow(`and ${count(left)} more: see cowshed top`));
  if (!rows.length) rows.push(wideRow("no guests"));
  $("guests").tBodies[0].replaceChildren(...rows);
}

function guestRow(guest) {
  const old = before && before.guestsByKey.get(keyOf(guest));
  const was = old && old.pid === guest.pid ? old : null;
  const hits = growth(guest, was, "hits");
  const faults = hits === null ? null : hits + growth(guest, was, "misses");
  const row = node("tr");
  const name = node("td");
  name.append(node("bdi", guest.name));
  name.title = guest.name;
  const isStopped = guest.state === STOPPED;
  const state = node("td", isStopped ? "STOPPED" : guest.state, isStopped ? "stopped" : guest.state);
  const via = guest.transport + (guest.mappings > 1 ? ` ×${guest.mappings}` : "");
  row.append(name, node("td", labelOf(guest, guest.image)), state, node("td", via), privateCell(guest));
  for (const text of [
    bytes(guest.granted_bytes),
    rate(faults),
    rate(growth(guest, was, "cow_breaks")),
    share(guest.hits, guest.hits + guest.misses),
    String(guest.pid),
  ]) row.append(node("td", text, "n"));
  return row;
}

function privateCell(guest) {
  const hasQuota = guest.quota_bytes !== null;
  const cell = node("td", bytes(guest.private_bytes) + (hasQuota ? ` of ${bytes(guest.quota_bytes)}` : ""), "n");
  if (hasQuota) {
    const meter = node("div", "", "meter");
    const part = Math.min(1, guest.private_bytes / guest.quota_bytes);
    const filled = node("span", "", part > 0.9 ? "full" : "");
    filled.style.width = `${100 * part}%`;
    meter.append(filled);
    cell.append(meter);
  }
  return cell;
}

function wideRow(text) {
  const row = node("tr");
  const cell = node("td", text, "empty");
  cell.colSpan = 10;
  row.append(cell);
  return row;
}

// ---- the tip

function showTip(event, { canvas, map, status }) {
  const cell = map ? cellAt(canvas, map, event.offsetX, event.offsetY) : -1;
  if (cell < 0) return hideTip();
  const first = cell * map.perCell;
  const nr = map.extentsIn(cell);
  const start = place(first * status.extent_bytes);
  const end = place(Math.min(status.size_bytes, (first + nr) * status.extent_bytes));
  const guests = map.refs[cell];
  $("tip").textContent = [
    nr === 1 ? `extent ${count(first)}, ${start} to ${end}` : `extents ${count(first)}–${count(first + nr - 1)}, ${start} to ${end}`,
    nr === 1
      ? map.resident[cell] ? "resident" : "not in memory"
      : `${map.resident[cell]} of ${nr} resident`,
    `${nr === 1 ? "" : "at most "}${guests === 1 ? "1 guest" : `${guests} guests`}, heat ${map.heat[cell]} of 6`,
    ...(map.pinned[cell] ? [nr === 1 ? "pinned" : `${map.pinned[cell]} pinned`] : []),
  ].join("\n");
  const tip = $("tip");
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  const y = event.clientY + 18 + tip.offsetHeight > window.innerHeight
    ? event.clientY - tip.offsetHeight - 12
    : event.clientY + 18;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, y)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

// ---- asking

function drawAll() {
  if (!newest) return;
  drawLegend();
  drawTotals(newest);
  drawAlerts(newest);
  drawImages(newest);
  drawGuests(newest);
  document.body.dataset.uptime = newest.uptime_seconds; // identifies the state on the screen
}

function drawLive() {
  const live = $("live");
  live.classList.toggle("stale", failure !== "");
  live.textContent = failure === ""
    ? "live"
    : answeredAt ? `no answer for ${seconds((Date.now() - answeredAt) / 1000)}: ${failure}` : `no answer: ${failure}`;
}

async function ask() {
  try {
    const answer = await fetch("state.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const state = await answer.json();
    answeredAt = Date.now();
    failure = "";
    observe(state);
    drawAll();
  } catch (error) {
    failure = error.name === "TimeoutError" ? "too slow" : error.message;
  }
  drawLive();
  setTimeout(again, POLL_MS);
}

// A hidden page does not fetch.
function again() {
  if (document.hidden) document.addEventListener("visibilitychange", ask, { once: true });
  else ask();
}

$("layers").addEventListener("change", (event) => {
  layer = event.target.value;
  hideTip();
  drawAll();
});
new ResizeObserver(drawAll).observe($("images"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
ask();
