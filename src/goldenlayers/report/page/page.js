(async () => {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const boxes = figures.map((_, i) => document.getElementById("c" + i));

  // Colours stand in the figures by name; the style knows what they are, by day and by night.
  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((one) => coloured(one, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, style)]));
  }

  function draw(i) {
    const views = figures[i], box = boxes[i];
    const picker = document.querySelector(`select[data-chart="${i}"]`);
    const { data, layout } = coloured(
      Object.values(views)[picker ? picker.selectedIndex : 0], getComputedStyle(root));
    if (layout.height) box.style.height = layout.height + "px";
    const read = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
    const narrow = box.clientWidth < 520;
    const axes = {};
    for (const name of Object.keys(layout).concat("xaxis", "yaxis"))
      if (/^[xy]axis\d*$/.test(name))
        axes[name] = { gridcolor: read("line"), linecolor: read("quiet"), ticks: "outside",
          tickcolor: read("quiet"), fixedrange: true, automargin: true, ...layout[name] };
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { color: read("ink"), size: narrow ? 11 : 12.5, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: read("soft"), bordercolor: read("quiet"), font: { color: read("ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, height: box.offsetHeight,
      margin: { l: 10, r: narrow ? 8 : 16, t: 24, b: 10 }, ...layout, ...axes };
    const across = whole.xaxis;
    if (narrow && across.dtick && (across.range[1] - across.range[0]) / across.dtick > 10)
      across.dtick = { 1: 2, 2: 5, 5: 10 }[across.dtick] || across.dtick * 2;
    if (narrow)
      for (const [name, value] of Object.entries((layout.meta || {}).narrow || {})) {
        const [axis, key] = name.split(".");
        whole[axis][key] = value;
      }
    return Plotly.react(box, data, whole, { displayModeBar: false, responsive: true });
  }

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent),
      (one) => one.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  try {
    await load();
  } catch (error) {  // a browser of before 2023: the tables say it all
    for (const box of boxes) {
      box.style.height = "auto";
      box.textContent = "This browser cannot draw the chart.";
      box.parentElement.querySelector("details").open = true;
    }
    return;
  }
  for (let i = 0; i < boxes.length; i++) {
    await draw(i);
    await new Promise((done) => setTimeout(done));  // the page stays alive
  }
  for (const picker of document.querySelectorAll("select[data-chart]"))
    picker.addEventListener("change", () => draw(Number(picker.dataset.chart)));
  const all = () => boxes.forEach((_, i) => draw(i));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  addEventListener("beforeprint", () => { root.classList.add("printing"); all(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); all(); });
  root.dataset.drawn = boxes.length;
})();
