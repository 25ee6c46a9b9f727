"use strict";
document.documentElement.dataset.ready = "no";
window.addEventListener("error", (event) => {
  document.documentElement.dataset.error = event.message;
});
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const STORE = `symdist report ${location.pathname}`;
  const COLOURS = 8;
  const HEIGHT = 220;
  const TALL = 300;
  const STRETCHES = 500;
  const EDGE = { left: 52, right: 10, top: 10, bottom: 22 };
  const BAD = ["spike", "nonfinite", "rollback", "save_failed", "timeout", "fallback"];
  const state = {
    hidden: [], axis: "step", log: false, smooth: 0, split: "run", open: [], scroll: 0, paused: false, range: null,
    ...recalled(),
  };
  const plots = [];
  const readout = byId("readout");
  let written = "";

  function byId(id) {
    return document.getElementById(id);
  }

  function recalled() {
    // A page from a file may be denied any store.
    try {
      return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
    } catch {
      return {};
    }
  }

  function remember() {
    state.scroll = window.scrollY;
    state.open = [...document.querySelectorAll("details[open]")].map((one) => one.id);
    try {
      sessionStorage.setItem(STORE, JSON.stringify(state));
    } catch { /* As above. */ }
  }

  function element(tag, attributes = {}, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function html(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // Numbers and times in words.

  function number(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    for (const [scale, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= scale) return `${+(value / (unit === "k" ? 1e3 : scale)).toPrecision(4)}${unit}`;
    }
    return String(+value.toPrecision(4));
  }

  function duration(seconds) {
    if (seconds < 60) return `${Math.round(seconds)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
    return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
  }

  function place(x) {
    if (state.axis === "step") return `step ${Math.round(x).toLocaleString("en")}`;
    return state.axis === "tokens" ? `${number(x)} tokens` : duration(x);
  }

  // Where a run's steps lie on the x axis; null where that is not known.

  function along(run, step) {
    if (state.axis === "step") return step;
    if (state.axis === "tokens") return run.tokens === null ? null : step * run.tokens;
    if (run.clock === null) return null;
    const { steps, seconds } = run.clock;
    let low = 0;
    let high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const share = (step - steps[low]) / Math.max(1, steps[high] - steps[low]);
    return seconds[low] + share * (seconds[high] - seconds[low]);
  }

  function decode(curve) {
    let step = 0;
    return curve.steps.map((jump, i) => ({ step: (step += jump), y: curve.values[i] }));
  }

  function positions(points, run) {
    for (const point of points) point.x = along(run, point.step);
  }

  function smoothed(points) {
    // Over stretches of steps, so that runs logged more or less often are smoothed alike.
    const unit = Math.max(1, ...DATA.runs.map((run) => run.last)) / STRETCHES;
    let sum = 0;
    let weight = 0;
    let before = -Infinity;
    return points.map((point) => {
      if (point.y === null) return point;
      const kept = point.step > before ? state.smooth ** ((point.step - before) / unit) : 0;
      before = point.step;
      // The sum of weights corrects the beginning, which would else lean towards zero.
      sum = kept * sum + (1 - kept) * point.y;
      weight = kept * weight + (1 - kept);
      return { ...point, y: sum / weight };
    });
  }

  // Axes: round numbers, or powers of ten with 2 and 5 where they are few.

  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const jump = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let i = Math.ceil(low / jump - 1e-9); i * jump <= high * (1 + 1e-9) + jump * 1e-9; i++) found.push(i * jump);
    return found;
  }

  function decades(low, high) {
    const span = Math.log10(high / low);
    if (span < 1) return ticks(low, high, 5);
    const factors = span < 2.5 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(span / 7));
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every) continue;
      for (const factor of factors) {
        const value = factor * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found;
  }

  function timeUnit(span) {
    if (span < 300) return [1, " s"];
    return span < 10800 ? [60, " min"] : [3600, " h"];
  }
