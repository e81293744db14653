"use strict";
// What all parts of the page share: the data, what is chosen, and the table of methods.
const page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const GREY = "#767676", BLUE = "#0072B2", VERMILLION = "#D55E00";
  const BASELINES = ["library size", "shuffled", "ridge", "centred ridge", "within section"];
  const PATIENTS = { new: "new patients", known: "known patients", all: "all patients" };
  const SCORES = {
    scc: ["SCC", "Spearman’s correlation with log1p(counts per 10,000), within a section. Depth can fool it: deep spots see a sparse gene more often."],
    pearson: ["Pearson", "Pearson’s correlation with log1p(counts per 10,000), within a section. Depth and a few extreme spots can fool it."],
    scc_counts: ["SCC, raw counts", "Spearman’s correlation with raw counts, within a section. It is mostly depth."],
    pearson_counts: ["Pearson, log1p(counts)", "Pearson’s correlation with log1p(counts), not divided by depth, within a section. It is mostly depth."],
    depth_matched: ["depth-matched SCC", "Spearman’s correlation after thinning all spots of a section to one depth: a function of depth scores 0 where there is no signal."],
    lift: ["lift", "How far counts outrun library size when spots are ordered by score. A function of depth scores 0 where there is no signal."],
    lift_relative: ["relative lift", "Lift, divided by that of the best order there is, which for sparse genes is mostly noise."],
    deviance: ["deviance explained", "Share of the list deviance that the scores explain: it asks for the right size of log fold changes. 1 is perfect, 0 no better than library size alone."],
    deviance_sloped: ["deviance explained, sloped", "Share of the list deviance explained after a slope for each gene, from training sections: for scores that are no log rates."],
    slope: ["calibration slope", "Slope of the counts on the predicted log rates: 1 is right, below 1 the predicted fold changes are too large. Scores that are no log rates got a slope from training sections first."],
    predicted: ["genes predicted", "Share of the panel’s genes that are predicted at all, with 5 % false discoveries: depth-matched, against tissue patterns of the same smoothness."],
    p_value: ["p", "How often maps as smooth as these, or with the same trend, would do as well; small is good."],
    q_value: ["q", "Share of false discoveries among genes up to this one; small is good."],
  };
  const BETTER_LOW = ["p_value", "q_value"];
  // Of which there is neither a lowest nor a highest that is best.
  const RIGHT_AT_ONE = ["slope"];
  const label = (score) => (SCORES[score] ?? [score])[0];

  // Plotly reads some HTML in every text, so names go there escaped.
  const plain = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const number = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  };
  const signed = (value) => (value !== null && Number(value.toFixed(3)) > 0 ? "+" : "") + number(value);
  const unique = (values) => [...new Set(values)];
  const median = (values) => {
    const sorted = values.filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  };

  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const fill = (select, values, name = (value) => value) => {
    const before = select.value;
    select.replaceChildren(...values.map((v) => element("option", name(v), { value: v })));
    if (values.map(String).includes(before)) select.value = before;
  };
  // A cell is a text, or a text and a smaller one below.
  const row = (head, cells, attributes = {}) => {
    const made = element("tr", "", attributes);
    made.append(element("th", head, { scope: "row" }));
    for (const cell of cells) {
      const [text, below] = [cell].flat(), place = element("td", text);
      if (below) place.append(element("small", below));
      made.append(place);
    }
    return made;
  };

  const layout = (more) => ({
    font: { family: "system-ui, Segoe UI, Roboto, sans-serif", size: 13, color: "#1f2933" },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    margin: { l: 60, r: 16, t: 12, b: 48 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hoverlabel: { bgcolor: "#fff", bordercolor: "#b8c1cc", font: { color: "#1f2933" } },
    ...more,
  });
  const axis = (title, more = {}) => ({
    title: { text: title, font: { size: 13 }, standoff: 12 }, gridcolor: "#e9edf1", zerolinecolor: "#b8c1cc", automargin: true, ...more,
  });
  const CONFIG = {
    displaylogo: false, responsive: true,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  const draw = (id, traces, more) => Plotly.react(find(id), traces, layout(more), CONFIG);

  const chosen = () =>
    Object.fromEntries(
      ["score", "method", "genes", "encoder", "patients"].map((id) => [id, find(id).value]),
    );

  function board() {
    const { score, method, genes, encoder, patients } = chosen();
    const all = data.leaderboard;
    const rows = all.method
      .map((_, i) => i)
      .filter((i) => all.score[i] === score && all.genes[i] === genes)
      .filter((i) => all.encoder[i] === encoder && all.patients[i] === patients)
      .map((i) => Object.fromEntries(Object.keys(all).map((key) => [key, all[key][i]])));
    const direction = BETTER_LOW.includes(score) ? 1 : -1;
    const last = direction * Infinity * -1;
    const rank = (r) => (r.mean === null ? last : RIGHT_AT_ONE.includes(score) ? -Math.abs(r.mean - 1) : r.mean);
    rows.sort((a, b) => direction * (rank(a) - rank(b)) || 0);
    find("score-text").textContent = `${label(score)}: ${(SCORES[score] ?? ["", ""])[1]}`;
    find("reference").textContent = data.reference;
    find("board-table").tBodies[0].replaceChildren(...rows.map((r) => boardRow(r, method)));
    boardPlot(rows, score);
    boardFinding(rows, score);
  }

  const interval = (low, high, show) => (low === null ? "" : `[${show(low)}, ${show(high)}]`);

  function boardRow(r, method) {
    const kind = r.method === data.reference ? "reference" : BASELINES.includes(r.method) ? "baseline" : "";
    const difference = r.method === data.reference || r.difference === null
      ? "–" : [signed(r.difference), interval(r.difference_low, r.difference_high, signed)];
    const part = r.fraction_of_ceiling === null ? "–" : `${number(100 * r.fraction_of_ceiling, 0)} %`;
    return row(r.method, [
      [number(r.mean), interval(r.low, r.high, number)], difference, part,
      `${number(r.n_sections, 0)} × ${number(r.n_genes, 0)}`,
    ], { class: `${kind} ${r.method === method ? "chosen" : ""}` });
  }

  function boardPlot(rows, score) {
    const kinds = [
      ["methods", BLUE, "circle", (m) => m !== data.reference && !BASELINES.includes(m)],
      ["reference", VERMILLION, "diamond", (m) => m === data.reference],
      ["baselines", GREY, "circle", (m) => BASELINES.includes(m) && m !== data.reference],
    ];
    const traces = kinds.map(([name, color, symbol, belongs]) => {
      const kept = rows.filter((r) => belongs(r.method) && r.mean !== null);
      return {
        name, type: "scatter", mode: "markers",
        x: kept.map((r) => r.mean), y: kept.map((r) => plain(r.method)),
        error_x: {
          type: "data", symmetric: false, thickness: 2, width: 0, color,
          array: kept.map((r) => (r.high ?? r.mean) - r.mean),
          arrayminus: kept.map((r) => r.mean - (r.low ?? r.mean)),
        },
        marker: { color, symbol, size: 10 },
        hoverinfo: "text",
        hovertext: kept.map((r) => `${plain(r.method)}: ${number(r.mean)} ${interval(r.low, r.high, number)}`),
      };
    });
    const depth = rows.find((r) => r.method === "library size")?.mean ?? null;
    const line = { type: "line", yref: "paper", y0: 0, y1: 1, x0: depth, x1: depth, layer: "below", line: { color: GREY, width: 1.5, dash: "dot" } };
    draw("board-plot", traces.filter((t) => t.x.length), {
      height: 90 + 30 * Math.max(rows.length, 3),
      shapes: depth === null ? [] : [line],
      xaxis: axis(plain(label(score))),
      yaxis: { automargin: true, categoryorder: "array", categoryarray: rows.map((r) => plain(r.method)).reverse(), range: [-0.6, rows.length - 0.4], ticksuffix: " " },
      margin: { l: 20, r: 16, t: 12, b: 48 },
    });
  }

  function boardFinding(rows, score) {
    const blind = ["library size", "shuffled", "within section"]; // none is a method to choose
    const learnt = rows.filter((r) => !blind.includes(r.method) && r.mean !== null);
    const depth = rows.find((r) => r.method === "library size");
    let text = rows.length ? "" : "There are no scores for this choice.";
    if (learnt.length) text = `Best: ${learnt[0].method}, ${number(learnt[0].mean)} ${interval(learnt[0].low, learnt[0].high, number)}.`;
    if (learnt.length && depth && depth.mean !== null && !score.startsWith("deviance") && !RIGHT_AT_ONE.includes(score)) {
      const above = BETTER_LOW.includes(score) ? learnt[0].mean < depth.mean : learnt[0].mean > depth.mean;
      text += ` Library size alone: ${number(depth.mean)}${above ? "." : ", which no method beats: this score says nothing about the image."}`;
    }
    find("board-finding").textContent = text;
  }

  function shown() {
    const now = chosen();
    const words = { score: label(now.score), method: now.method, genes: `${now.genes} genes`, encoder: now.encoder, patients: PATIENTS[now.patients] };
    for (const place of document.querySelectorAll(".shown"))
      place.textContent = place.dataset.shown.split(" ").map((key) => words[key]).join(" · ");
    for (const place of document.querySelectorAll("[data-name]")) place.textContent = now[place.dataset.name];
  }

  const parts = [board, shown];
  const update = () => parts.forEach((part) => part());

  // What is not in the page lies in a file beside it, which hands it over; each is asked for once.
  const held = data.parts, asked = new Map();
  function part(name, redraw) {
    if (!(name in held) && !asked.has(name)) {
      asked.set(name, redraw);
      const file = `${data.beside}/${data.files[name]}`, script = element("script", "", { src: file });
      script.addEventListener("error", () => {
        find("absent").textContent = `${file} is not there, or of another page: keep ${data.beside} beside this page, or make both again with strank report.`;
        find("absent").hidden = false;
      });
      document.head.append(script);
    }
    return held[name];
  }
  const take = (name, content) => {
    held[name] = content;
    asked.get(name)();
  };

  function start() {
    const all = data.leaderboard;
    fill(find("score"), unique(all.score), label);
    fill(find("method"), unique(all.method));
    fill(find("genes"), data.genes.filter((size) => all.genes.includes(size)), (size) => `${size} genes`);
    fill(find("encoder"), data.encoders.filter((name) => all.encoder.includes(name)));
    fill(find("patients"), ["new", "known", "all"].filter((p) => all.patients.includes(p)), (p) => PATIENTS[p]);
    if (all.score.includes(data.headline)) find("score").value = data.headline;
    if (all.method.includes(data.reference)) find("method").value = data.reference;
    document.querySelector(".toolbar").addEventListener("change", update);
    document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
    // Paper is narrower than the screen, and figures do not know.
    const resize = (plots, maps) => {
      for (const div of document.querySelectorAll(".plot")) Plotly.relayout(div, { width: plots });
      page.drawMaps(maps);
    };
    window.addEventListener("beforeprint", () => resize(660, 210));
    window.addEventListener("afterprint", () => resize(null, null));
    update();
  }

  return {
    data, find, plain, bytes, floats, number, unique, median, element, fill, row, axis, draw, layout,
    chosen, label, parts, part, take, start, BASELINES, CONFIG, GREY, BLUE, VERMILLION, PATIENTS,
  };
})();
