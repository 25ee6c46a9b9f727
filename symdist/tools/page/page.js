// Apply the controls to all plots, and keep them, what is open and the zoom while the page reloads.
(async () => {
  const places = document.querySelectorAll(".plot");
  while (places.length && !Bokeh.documents[0]?.is_idle) await new Promise((done) => setTimeout(done, 20));
  const form = document.forms.controls;
  const { axis, log, smooth, pause } = form.elements;
  const inputs = [...form.querySelectorAll("[name]"), ...document.querySelectorAll("details")];
  const plots = Bokeh.documents[0]?.roots() ?? [];
  const range = plots[0]?.x_range;
  const model = (name) => new (Bokeh.Models.get(name))();
  const keep = () => history.replaceState({
    fields: inputs.map(({ checked, open, value }) => ({ checked, open, value })),
    zoom: range?.have_updated_interactively ? { start: range.start, end: range.end } : null,
  }, "");
  const apply = (event) => {
    plots.forEach((plot, i) => {
      for (const line of plot.renderers) {
        line.visible = form.querySelector(`[name=run][value="${line.glyph.tags[0]}"]`).checked;
        line.glyph.x = { field: axis.value };
        if (line.glyph.tags[1]) line.glyph.y = { field: smooth.value };
      }
      places[i].hidden = !plot.renderers.some((line) => line.visible);
      plot.y_scale = model(log.checked ? "LogScale" : "LinearScale");
      plot.left[0].ticker = model(log.checked ? "LogTicker" : "BasicTicker");
    });
    if (event?.target.name === "axis") range.reset();
    if (event) keep();
  };
  const { fields = [], zoom } = history.state ?? {};
  fields.forEach((kept, i) => Object.assign(inputs[i] ?? {}, kept));
  form.addEventListener("change", apply);
  apply();
  if (zoom) Object.assign(range, { ...zoom, have_updated_interactively: true });
  // The box drawn sets the y axis too, which is to fit what is seen.
  range?.properties.start.change.connect(() => setTimeout(() => plots.forEach((plot) => plot.y_range.reset())));
  const busy = () => pause.checked || document.hidden || String(getSelection()) || document.querySelector(".plot:hover");
  const { every } = document.body.dataset;
  if (every) setInterval(() => busy() || (keep(), location.reload()), every * 1000);
  document.documentElement.dataset.ready = "yes";
})();
