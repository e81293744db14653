"use strict";
// Maps of a gene over the image, and whether predicted fold changes are right.
(() => {
  const { data, find, plain, bytes, number, unique, fill, row, axis, draw, layout, chosen, CONFIG, GREY, BLUE } = page;
  // ColorBrewer's RdBu, as in the maps that `strank predict` draws.
  const COLOURS = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"]
    .map((colour, i) => [i / 10, colour]);
  const PLACES = ["map-image", "map-observed", "map-predicted"];
  // The full colours stand for half as much again, or more, where scores have a unit.
  const LEAST_LIMIT = Math.log(1.5);
  const LOG_RATES = new Set(data.calibration.map((line) => line.method));

  const named = (map) => {
    const several = data.maps.filter((other) => other.section === map.section).length > 1;
    return several ? `${map.section}, fold ${map.fold}` : map.section;
  };
  const mapNow = () => data.maps[Number(find("map-section").value)];
  const genesOf = (map) => data.panels[map.panel];

  function gene(layer, map, number) {
    const n = map.xy[0].length;
    layer.decoded ??= bytes(layer.codes);
    const single = layer.limits.length === 1 ? 0 : number;
    return Array.from(layer.decoded.subarray(single * n, (single + 1) * n), (code) =>
      code === 255 ? null : ((code - 127) / 127) * layer.limits[single]);
  }

  function limitOf(values, hasUnit) {
    const sizes = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    // One spot far out must not wash out the rest, and a flat map must look flat.
    const far = sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 0;
    return Math.max(far, hasUnit ? LEAST_LIMIT : 1e-6);
  }

  // On paper all have one width; on the screen, that of their place.
  let printed = null;
  const innerWidth = (div) => Math.max((printed ?? div.parentElement.clientWidth) - 8, 120);

  function extent(map) {
    return map.image ? map.image.size : map.xy.map((values) => Math.max(...values) + 1.5 * map.diameter);
  }

  function picture(id, map, title, values, unit) {
    const div = find(id), [width, height] = extent(map);
    const inner = innerWidth(div);
    const limit = values && limitOf(values, unit !== null);
    const trace = {
      type: "scatter", mode: "markers", x: map.xy[0], y: map.xy[1],
      hoverinfo: values ? "text" : "skip",
      hovertext: values ? values.map((v) => number(v, 2)) : [],
      marker: {
        size: (map.diameter * inner) / width, opacity: values ? Number(find("map-opacity").value) / 100 : 0,
        line: { width: 0.6, color: "rgba(31, 41, 51, 0.4)" },
        ...(values && {
          color: values, cmin: -limit, cmax: limit, colorscale: COLOURS,
          colorbar: { orientation: "h", y: 0, yanchor: "top", ypad: 6, len: 0.9, thickness: 9, outlinewidth: 0, nticks: 5, title: { text: unit ?? "no unit", side: "bottom", font: { size: 12 } } },
        }),
      },
    };
    const images = map.image ? [{
      source: `data:image/jpeg;base64,${map.image.jpeg}`, xref: "x", yref: "y", x: 0, y: 0,
      sizex: width, sizey: height, sizing: "stretch", layer: "below",
    }] : [];
    const hidden = { visible: false, fixedrange: false };
    return Plotly.react(div, [trace], layout({
      title: { text: title, font: { size: 14 }, x: 0.5, y: 1, yanchor: "top", pad: { t: 6 } },
      width: inner + 8, height: Math.ceil((inner * height) / width) + 30 + 62, margin: { l: 4, r: 4, t: 30, b: 62 }, images, showlegend: false,
      plot_bgcolor: "#eef1f4", dragmode: "zoom",
      xaxis: { ...hidden, range: [0, width] },
      yaxis: { ...hidden, range: [height, 0], scaleanchor: "x", constrain: "domain" },
      ...(values ? {} : scaleBar(map, width, height)),
    }), { ...CONFIG, responsive: false, doubleClick: false });
  }

  function scaleBar(map, width, height) {
    const length = width > 2500 ? 1000 : 200, x = 0.05 * width, y = 0.94 * height;
    if (map.unit !== "µm") return {};
    return {
      shapes: [
        { type: "rect", x0: x - 0.02 * width, x1: x + length + 0.02 * width, y0: y - 0.075 * height, y1: y + 0.025 * height, fillcolor: "#fff", opacity: 0.85, line: { width: 0 } },
        { type: "line", x0: x, x1: x + length, y0: y, y1: y, line: { width: 4, color: "#1f2933" } },
      ],
      annotations: [{ x: x + length / 2, y, yanchor: "bottom", showarrow: false, text: length === 1000 ? "1 mm" : "200 µm", font: { size: 11 } }],
    };
  }

  // A layer of some genes, where the section has it.
  function predicted(map, block, method, encoder) {
    if (method === "library size") return map.depth;
    return block.predicted[map.predicted.findIndex((layer) => layer.method === method && layer.encoder === encoder)];
  }

  function unitOf(method) {
    if (LOG_RATES.has(method)) return "log relative expression";
    if (method === "library size") return "log library size, minus mean";
    return method.endsWith("ridge") ? "log1p(CP10k), minus mean" : null;
  }

  function maps() {
    const about = mapNow();
    if (!about) return;
    const { method, encoder } = chosen(), name = find("map-gene").value, at = genesOf(about).indexOf(name);
    const map = page.part(about.part, maps), block = page.part(about.blocks[Math.floor(at / data.block)], maps);
    if (!map || !block) {
      find("map-status").textContent = `${name} in ${named(about)} is being loaded`;
      return;
    }
    const number = at % data.block, layer = predicted(map, block, method, encoder);
    const observed = block.observed && gene(block.observed, map, number);
    const measured = observed && observed.some((v) => v !== null);
    picture("map-image", map, map.image ? "H&amp;E" : "no H&amp;E", null, null);
    picture("map-observed", map, !observed ? "observed: no counts" : measured ? "observed" : "observed: not measured", measured ? observed : null, "log1p(CP10k), minus mean");
    picture("map-predicted", map, layer ? plain(method) : `${plain(method)}: not kept`, layer ? gene(layer, map, number) : null, unitOf(method));
    for (const id of PLACES) linkZoom(find(id), map);
    find("map-status").textContent = `${name} in ${named(about)} (${page.PATIENTS[about.patients].replace("patients", "patient")}): observed, and by ${method}`
      + (layer ? "" : ", of which no predictions are kept; choose another method");
  }

  // All three show the same part, with spots of their true size.
  function zoom(map, x, y) {
    for (const div of PLACES.map(find)) {
      const size = (map.diameter * innerWidth(div)) / Math.abs(x[1] - x[0]);
      Plotly.update(div, { "marker.size": size }, { "xaxis.range": x, "yaxis.range": y });
    }
  }

  function linkZoom(div, map) {
    for (const event of ["plotly_relayout", "plotly_doubleclick"]) div.removeAllListeners(event);
    const [width, height] = extent(map);
    div.on("plotly_doubleclick", () => zoom(map, [0, width], [height, 0]));
    div.on("plotly_relayout", (change) => {
      if (change["xaxis.range[0]"] !== undefined)
        zoom(map, [change["xaxis.range[0]"], change["xaxis.range[1]"]], [...div.layout.yaxis.range]);
    });
  }

  function genesOfSection() {
    if (mapNow()) fill(find("map-gene"), genesOf(mapNow()));
  }

  page.showGene = (name) => {
    if (!genesOf(mapNow()).includes(name)) {
      find("map-section").value = data.maps.findIndex((map) => genesOf(map).includes(name));
      genesOfSection();
    }
    find("map-gene").value = name;
    maps();
  };

  function calibration() {
    const { encoder, patients, method } = chosen();
    const lines = data.calibration.filter((line) => line.encoder === encoder && line.patients === patients);
    const line = lines.find((l) => l.method === method) ?? lines.find((l) => l.method === data.reference) ?? lines[0];
    find("calibration-table").tBodies[0].replaceChildren(...lines.map((l) => {
      const slopes = l.sections.map((s) => s.slope).filter((s) => s !== null).sort((a, b) => a - b);
      return row(l.method, [number(l.pooled.slope, 2), slopes.length ? `${number(slopes[0], 2)} to ${number(slopes.at(-1), 2)}` : "–"],
        { class: l === line ? "chosen" : "" });
    }));
    const curve = (c, more) => ({ type: "scatter", mode: "lines", x: c.predicted, y: c.observed, showlegend: false, hoverinfo: "skip", ...more });
    const thin = line ? line.sections.map((s) => curve(s, { line: { color: "#9ecae1", width: 1 } })) : [];
    const bold = line ? [curve(line.pooled, {
      mode: "lines+markers", line: { color: BLUE, width: 3 }, marker: { size: 8 }, hoverinfo: "text",
      hovertext: line.pooled.predicted.map((p, i) => `predicted ${number(p, 2)}×, observed ${number(line.pooled.observed[i], 2)}×<br>${line.pooled.counts[i].toLocaleString("en")} counts`),
    })] : [];
    const all = line ? [...line.pooled.predicted, ...line.pooled.observed, 0.7, 1.4] : [0.5, 2];
    const range = [Math.log10(Math.min(...all)) - 0.04, Math.log10(Math.max(...all)) + 0.04];
    const ticks = [0.1, 0.2, 0.33, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10];
    const fold = (title) => axis(title, { type: "log", range, tickvals: ticks, ticktext: ticks.map((t) => `${t}×`), zeroline: false });
    draw("calibration-plot", [...thin, ...bold], {
      height: 420, xaxis: fold("predicted fold change"), yaxis: fold("observed fold change"),
      shapes: [{ type: "line", x0: 10 ** range[0], y0: 10 ** range[0], x1: 10 ** range[1], y1: 10 ** range[1], layer: "below", line: { color: GREY, dash: "dash" } }],
    });
    find("calibration-finding").textContent = !line ? "There is nothing to calibrate for this choice."
      : `${line.method}: slope ${number(line.pooled.slope, 2)}${line.method === method ? "" : ` (scores of ${method} are no log rates, or are not kept)`}.`;
  }

  page.drawMaps = (width) => {
    printed = width;
    maps();
  };
  let wide = 0;
  new ResizeObserver(([entry]) => {
    // Drawing changes the height, which must not draw again.
    if (Math.abs(entry.contentRect.width - wide) > 1 && wide) maps();
    wide = entry.contentRect.width;
  }).observe(document.querySelector(".maps"));

  // What this page lacks, its header says.
  find("maps").hidden = !data.maps.length;
  find("calibration").hidden = !data.calibration.length;
  fill(find("map-section"), data.maps.map((_, i) => i), (i) => named(data.maps[i]));
  genesOfSection();
  find("map-section").addEventListener("change", () => (genesOfSection(), maps()));
  find("map-gene").addEventListener("change", maps);
  find("map-opacity").addEventListener("input", maps);
  page.parts.push(maps, calibration);
  page.start();
})();
