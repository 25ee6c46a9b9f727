  // Reading values.

  function inside(plot, event) {
    const { left, width } = plot.svg.getBoundingClientRect();
    return ((event.clientX - left) / width) * plot.scale.width;
  }

  function hover(plot, event) {
    if (!plot.scale) return;
    const pixel = inside(plot, event);
    if (plot.from !== undefined && plot.from !== null) {
      plot.span.setAttribute("x", Math.min(pixel, plot.from));
      plot.span.setAttribute("width", Math.abs(pixel - plot.from));
    }
    read(plot, plot.scale.back(pixel), event.clientX, event.clientY);
  }

  function nearest(points, x) {
    let best = null;
    for (const point of points) {
      if (point.y === null || point.x === null) continue;
      if (best === null || Math.abs(point.x - x) <= Math.abs(best.x - x)) best = point;
    }
    return best;
  }

  function read(plot, wanted, clientX, clientY) {
    const found = visible(plot).map((line) => [line, nearest(line.points, wanted)]).filter(([, point]) => point !== null);
    if (!found.length) return;
    const close = found.map(([, point]) => point).reduce((a, b) => (Math.abs(b.x - wanted) < Math.abs(a.x - wanted) ? b : a));
    plot.at = close.x;
    const at = plot.scale.x(close.x);
    for (const end of ["x1", "x2"]) plot.cursor.setAttribute(end, at);
    plot.cursor.setAttribute("visibility", "visible");
    const rows = found.map(([line, point]) => {
      const name = line.kind === "train" ? line.name : `${line.name}, ${line.kind}`;
      const away = point.step === close.step ? "" : ` at ${point.step.toLocaleString("en")}`;
      return html("tr", {}, html("td", {}, swatch(line.colour), name), html("td", {}, number(point.y)), html("td", {}, away));
    });
    const near = !plot.loss ? [] : DATA.events.filter((event) => {
      const run = DATA.runs[event.run];
      const x = along(run, event.step);
      return x !== null && !state.hidden.includes(run.name) && Math.abs(plot.scale.x(x) - at) < 6;
    });
    const notes = near.slice(-6).map((event) =>
      html("p", {}, swatch(event.run), html("b", {}, event.event), ` at step ${event.step}. ${event.text}`));
    const head = state.axis === "step" ? place(close.x) : `${place(close.x)}, step ${close.step.toLocaleString("en")}`;
    readout.replaceChildren(html("b", {}, head), html("table", {}, ...rows), ...notes);
    readout.hidden = false;
    const left = clientX + 16 + readout.offsetWidth > innerWidth ? clientX - 16 - readout.offsetWidth : clientX + 16;
    readout.style.left = `${Math.max(4, Math.min(left, innerWidth - readout.offsetWidth - 4))}px`;
    readout.style.top = `${Math.max(4, Math.min(clientY + 12, innerHeight - readout.offsetHeight - 4))}px`;
  }

  function leave(plot) {
    readout.hidden = true;
    plot.from = null;
    plot.cursor?.setAttribute("visibility", "hidden");
    plot.span?.setAttribute("width", 0);
  }

  function walk(plot, event) {
    if (event.key === "Escape") return leave(plot);
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!turn || !plot.scale) return undefined;
    event.preventDefault();
    const { box, x } = plot.scale;
    const all = visible(plot).flatMap((line) => line.points).filter((point) => point.x !== null && point.y !== null);
    const within = [...new Set(all.map((point) => point.x))].filter((at) => at >= box.left && at <= box.right);
    const places = within.sort((a, b) => a - b);
    const now = plot.at === undefined ? (turn > 0 ? -1 : places.length) : places.findIndex((at) => at >= plot.at);
    const next = places[Math.max(0, Math.min(places.length - 1, now + turn))];
    const rect = plot.svg.getBoundingClientRect();
    read(plot, next, rect.left + (x(next) / plot.scale.width) * rect.width, rect.top + 20);
    return undefined;
  }

  function zoom(plot, event) {
    if (plot.from === null || plot.from === undefined || !plot.scale) return;
    const ends = [plot.from, inside(plot, event)].sort((a, b) => a - b);
    plot.from = null;
    if (ends[1] - ends[0] < 8) plot.span.setAttribute("width", 0);
    else change("range", ends.map(plot.scale.back));
  }

  // Switches.

  function change(key, value) {
    if (key === "axis" && value !== state.axis) state.range = null;
    state[key] = value;
    show();
    if (key === "split") layOut();
    else plots.forEach(draw);
    remember();
  }

  function show() {
    for (const chip of document.querySelectorAll(".chip")) {
      chip.setAttribute("aria-pressed", String(!state.hidden.includes(DATA.runs[chip.dataset.run].name)));
    }
    for (const one of document.querySelectorAll("[name=axis]")) one.checked = one.value === state.axis;
    byId("log").checked = state.log;
    byId("smooth").value = state.smooth;
    byId("smoothed").value = state.smooth;
    byId("split").value = state.split;
    byId("zoom").hidden = state.range === null;
    byId("pause").setAttribute("aria-pressed", String(state.paused));
    byId("pause").textContent = state.paused ? "paused" : "pause";
  }

  function wire() {
    for (const chip of document.querySelectorAll(".chip")) {
      const { name } = DATA.runs[chip.dataset.run];
      chip.addEventListener("click", () => {
        const rest = state.hidden.filter((other) => other !== name);
        change("hidden", rest.length < state.hidden.length ? rest : [...rest, name]);
      });
    }
    for (const one of document.querySelectorAll("[name=axis]")) {
      one.disabled = one.value === "tokens" ? DATA.runs.every((run) => run.tokens === null)
        : one.value === "time" && DATA.runs.every((run) => run.clock === null);
      if (one.disabled && state.axis === one.value) state.axis = "step";
      one.addEventListener("change", () => change("axis", one.value));
    }
    byId("log").addEventListener("change", (event) => change("log", event.target.checked));
    byId("smooth").addEventListener("input", (event) => change("smooth", Number(event.target.value)));
    byId("split").addEventListener("change", (event) => change("split", event.target.value));
    byId("split-label").hidden = DATA.runs.length < 2 || DATA.panels.every((panel) => !panel.parts.length);
    byId("zoom").addEventListener("click", () => change("range", null));
    byId("pause").hidden = !DATA.live;
    byId("pause").addEventListener("click", () => change("paused", !state.paused));
    for (const id of state.open) byId(id)?.setAttribute("open", "");
    let pending;
    addEventListener("resize", () => {
      clearTimeout(pending);
      pending = setTimeout(() => plots.forEach(draw), 100);
    });
    addEventListener("pagehide", remember);
    addEventListener("beforeprint", () => {
      for (const one of document.querySelectorAll("details")) {
        one.dataset.was = one.open ? "open" : "";
        one.open = true;
      }
    });
    addEventListener("afterprint", () => {
      for (const one of document.querySelectorAll("details")) one.open = one.dataset.was === "open";
    });
  }

  function tell() {
    for (const one of document.querySelectorAll("[data-ago]")) {
      one.textContent = `${duration(Math.max(0, Date.now() / 1000 - one.dataset.ago))} ago`;
    }
  }

  function follow() {
    if (!DATA.live) return;
    // Not under the reader's hands.
    const busy = () => state.paused || !readout.hidden || document.hidden || String(getSelection()) !== ""
      || plots.some((plot) => typeof plot.from === "number") || document.activeElement?.matches("input[type=range]:active, select");
    const turn = () => (busy() ? setTimeout(turn, 500) : location.reload());
    setTimeout(turn, DATA.every * 1000);
  }

  for (const one of document.querySelectorAll("[data-at]")) {
    const time = new Date(one.dataset.at * 1000);
    one.dateTime = time.toISOString();
    one.textContent = time.toLocaleString();
  }
  wire();
  show();
  layOut();
  tell();
  setInterval(tell, 1000);
  // The browser would restore it before there are curves to scroll past.
  history.scrollRestoration = "manual";
  scrollTo(0, state.scroll);
  follow();
  document.documentElement.dataset.ready = "yes";
})();
