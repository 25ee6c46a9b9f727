  // Plots: a panel, or for measures of parts one panel for each run or each part.

  function layOut() {
    const home = byId("curves");
    home.replaceChildren();
    plots.length = 0;
    for (const group of DATA.groups) {
      const panels = DATA.panels.filter((panel) => panel.group === group);
      if (!panels.length) continue;
      const grid = html("div", { class: "grid" });
      home.append(html("section", {}, html("h2", {}, group), grid));
      for (const panel of panels) {
        if (!panel.parts.length) {
          addPlot(grid, panel, panel.title, panel.curves.map((curve) => [curve, curve.run, DATA.runs[curve.run].name]));
        } else if (state.split === "run") {
          DATA.runs.forEach((run, i) => {
            const own = panel.curves.filter((curve) => curve.run === i);
            if (!own.length) return;
            const lines = own.map((curve) => [curve, panel.parts.indexOf(curve.part), curve.part]);
            addPlot(grid, panel, DATA.runs.length > 1 ? `${panel.title}: ${run.name}` : panel.title, lines, panel.parts);
          });
        } else {
          for (const part of panel.parts) {
            const own = panel.curves.filter((curve) => curve.part === part);
            addPlot(grid, panel, `${panel.title}: ${part}`, own.map((curve) => [curve, curve.run, DATA.runs[curve.run].name]));
          }
        }
      }
    }
    plots.forEach(draw);
  }

  function addPlot(grid, panel, title, lines, parts) {
    const svg = element("svg", { role: "img", tabindex: "0", "aria-label": `${title}; arrow keys read values` });
    const figure = html("figure", { class: panel.key === "loss" ? "wide" : "" }, html("figcaption", {}, title), svg);
    const plot = {
      figure, svg, title, loss: panel.key === "loss", parts: Boolean(parts),
      lines: lines.map(([curve, colour, name]) => ({
        run: curve.run, kind: curve.kind, colour, name, points: decode(curve), mean: curve.mean ? decode(curve.mean) : null,
      })),
    };
    if (parts) {
      const shown = [...new Set(plot.lines.map((line) => line.colour))];
      figure.append(html("div", { class: "parts" }, ...shown.map((i) => html("span", {}, swatch(i), parts[i]))));
    }
    grid.append(figure);
    plots.push(plot);
    svg.addEventListener("pointermove", (event) => hover(plot, event));
    svg.addEventListener("pointerleave", () => leave(plot));
    svg.addEventListener("pointerdown", (event) => { plot.from = event.pointerType === "mouse" ? inside(plot, event) : null; });
    svg.addEventListener("pointerup", (event) => zoom(plot, event));
    svg.addEventListener("dblclick", () => change("range", null));
    svg.addEventListener("keydown", (event) => walk(plot, event));
    svg.addEventListener("blur", () => leave(plot));
  }

  function swatch(i) {
    const made = html("i", { class: "swatch", style: `--run:var(--c${i % COLOURS})` });
    if (i >= COLOURS) made.dataset.second = "";
    return made;
  }

  function visible(plot) {
    return plot.lines.filter((line) => !state.hidden.includes(DATA.runs[line.run].name));
  }

  function draw(plot) {
    const { svg, figure } = plot;
    const lines = visible(plot);
    // The only run of a panel hides the panel.
    figure.hidden = !lines.length;
    svg.replaceChildren(element("title", {}, plot.title));
    plot.scale = null;
    if (figure.hidden) return;
    const width = svg.clientWidth || 400;
    const height = plot.loss ? TALL : HEIGHT;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const line of lines) {
      positions(line.points, DATA.runs[line.run]);
      if (line.mean) positions(line.mean, DATA.runs[line.run]);
    }
    const drawn = lines.map((line) => line.points.filter((point) => point.x !== null));
    const box = extent(drawn.flat(), state.range);
    if (box === null) {
      svg.append(element("text", { x: width / 2, y: height / 2, class: "none" }, "nothing to draw on these axes"));
      return;
    }
    const [left, right] = [EDGE.left, width - EDGE.right];
    const [top, bottom] = [EDGE.top, height - EDGE.bottom];
    const up = state.log ? Math.log10 : (value) => value;
    const x = (value) => left + ((value - box.left) / (box.right - box.left)) * (right - left);
    const y = (value) => bottom - ((up(value) - up(box.low)) / (up(box.high) - up(box.low))) * (bottom - top);
    const back = (pixel) => box.left + ((pixel - left) / (right - left)) * (box.right - box.left);
    plot.scale = { x, y, back, box, left, right, top, bottom, width };
    axes(plot);
    const clip = `clip${plots.indexOf(plot)}`;
    svg.append(element("clipPath", { id: clip }));
    svg.lastChild.append(element("rect", { x: left, y: top - 4, width: right - left, height: bottom - top + 8 }));
    const inner = element("g", { "clip-path": `url(#${clip})` });
    svg.append(inner);
    if (plot.loss) marks(plot, inner);
    for (const line of lines) {
      const faint = plot.loss && line.kind === "train" && state.smooth > 0;
      inner.append(path(line, line.points, plot, faint ? "faint" : line.kind));
      if (faint) inner.append(path(line, smoothed(line.mean ?? line.points), plot, "smooth"));
      if (line.kind !== "train" || line.points.length === 1) inner.append(path(line, line.points, plot, "dots"));
    }
    plot.cursor = element("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    plot.span = element("rect", { class: "span", y: top, height: bottom - top, width: 0 });
    svg.append(plot.span, plot.cursor);
  }

  function extent(points, range) {
    const seen = points.filter(
      (point) => point.y !== null && (!state.log || point.y > 0) && (!range || (point.x >= range[0] && point.x <= range[1])),
    );
    if (!seen.length) return null;
    const box = { left: Infinity, right: -Infinity, low: Infinity, high: -Infinity };
    for (const { x, y } of seen) {
      box.left = Math.min(box.left, x);
      box.right = Math.max(box.right, x);
      box.low = Math.min(box.low, y);
      box.high = Math.max(box.high, y);
    }
    if (range) [box.left, box.right] = range;
    if (box.left === box.right) [box.left, box.right] = [box.left - 1, box.right + 1];
    if (state.log) {
      const room = Math.max((box.high / box.low) ** 0.04, 1.01);
      return { ...box, low: box.low / room, high: box.high * room };
    }
    const room = (box.high - box.low) * 0.05 || Math.abs(box.high) * 0.1 || 1;
    // What cannot be negative is not drawn as if it could.
    const low = box.low >= 0 && box.low - room < 0 ? 0 : box.low - room;
    return { ...box, low, high: box.high + room };
  }

  function axes(plot) {
    const { svg, scale } = plot;
    const { box, left, right, top, bottom, x, y } = scale;
    for (const value of state.log ? decades(box.low, box.high) : ticks(box.low, box.high, 5)) {
      svg.append(element("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }));
      svg.append(element("text", { class: "ytick", x: left - 6, y: y(value) + 4 }, number(+value.toPrecision(10))));
    }
    const [unit, name] = state.axis === "time" ? timeUnit(box.right - box.left) : [1, ""];
    for (const value of ticks(box.left / unit, box.right / unit, Math.max(2, (right - left) / 65))) {
      const at = x(value * unit);
      const anchor = at > right - 20 ? "end" : "middle";
      svg.append(element("line", { class: "rule", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
      svg.append(
        element("text", { class: "xtick", x: at, y: bottom + 16, "text-anchor": anchor }, number(+value.toPrecision(10)) + name),
      );
    }
    svg.append(element("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
  }

  function path(line, points, plot, look) {
    const { x, y } = plot.scale;
    let text = "";
    let pen = false;
    let before = -Infinity;
    for (const point of points) {
      const gap = point.y === null || point.x === null || (state.log && point.y <= 0);
      if (!gap) {
        const at = `${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`;
        // A run that went back begins a line anew.
        if (look === "dots") text += `M${at}h0`;
        else text += (pen && point.step >= before ? "L" : "M") + at;
      }
      pen = !gap;
      before = point.step;
    }
    const second = line.colour >= COLOURS ? " second" : "";
    return element("path", { d: text, class: `curve ${look}${second}`, style: `--run:var(--c${line.colour % COLOURS})` });
  }

  function marks(plot, home) {
    const { x, top, bottom } = plot.scale;
    for (const event of DATA.events) {
      const run = DATA.runs[event.run];
      const at = along(run, event.step);
      if (at === null || state.hidden.includes(run.name)) continue;
      const kind = BAD.includes(event.event) ? "bad" : event.event === "save" ? "save" : "plain";
      const mark = element("g", { class: `mark ${kind}`, style: `--run:var(--c${event.run % COLOURS})` });
      mark.append(element("title", {}, `${run.name}, step ${event.step}: ${event.event}. ${event.text}`));
      mark.append(element("line", { x1: x(at), x2: x(at), y1: kind === "save" ? bottom - 6 : top, y2: bottom }));
      if (kind === "bad") mark.append(element("path", { d: `M${x(at) - 5} ${top - 4}h10l-5 8z` }));
      home.append(mark);
    }
  }
