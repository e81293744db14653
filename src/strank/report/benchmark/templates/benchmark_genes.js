"use strict";
// What is told of single genes: against their counts, against their ceiling, and in a table.
(() => {
  const { data, find, plain, floats, number, median, element, axis, draw, chosen, label, BASELINES, GREY, BLUE } = page;
  const CEILINGS = ["depth_matched", "scc", "pearson"];
  const MAPPED = new Set(data.panels.flat());
  // A browser does not draw more rows, nor more dots, at ease.
  const MOST = 2000;
  // 0.001, 0.002, 0.005, 0.01, ... as marks of an axis.
  const COUNTS = [-3, -2, -1, 0, 1, 2, 3].flatMap((e) => [1, 2, 5].map((d) => Number(`${d}e${e}`)));
  const CIVIDIS = [[0, "#00224e"], [0.25, "#414d6b"], [0.5, "#7d7c78"], [0.75, "#bcad6c"], [1, "#fee838"]];

  const tableNow = () => {
    const now = chosen();
    const found = data.tables.find((t) => ["genes", "encoder", "patients"].every((key) => t[key] === now[key]));
    const table = found && page.part(found.part, () => [depth, ceiling, genes].forEach((one) => one()));
    if (table && !table.decoded) {
      table.decoded = true;
      table.values = floats(table.values);
      table.mean_counts = floats(table.mean_counts);
      for (const score of Object.keys(table.ceilings)) table.ceilings[score] = floats(table.ceilings[score]);
    }
    return table;
  };
  // Genes are in the order of their counts, so that these are spread over them.
  const dots = (list) => list.filter((_, i) => i % Math.ceil(list.length / MOST) === 0);

  function values(table, method, score) {
    const m = table.methods.indexOf(method), s = table.scores.indexOf(score), n = table.names.length;
    if (m < 0 || s < 0) return new Float32Array(n).fill(NaN);
    return table.values.subarray((m * table.scores.length + s) * n, (m * table.scores.length + s + 1) * n);
  }

  // Medians of parts with equally many genes.
  function running(x, y) {
    const order = [...x.keys()].filter((i) => !Number.isNaN(y[i]) && x[i] > 0).sort((a, b) => x[a] - x[b]);
    const parts = Math.max(3, Math.min(15, Math.floor(order.length / 12)));
    const cuts = Array.from({ length: parts }, (_, k) =>
      order.slice(Math.floor((k * order.length) / parts), Math.floor(((k + 1) * order.length) / parts)));
    const kept = cuts.filter((part) => part.length);
    return { x: kept.map((part) => median(part.map((i) => x[i]))), y: kept.map((part) => median(part.map((i) => y[i]))) };
  }

  function depth() {
    const table = tableNow(), { score, method } = chosen(), traces = [];
    const shown = method === "library size" ? [method] : ["library size", method];
    for (const name of table ? shown : []) {
      const y = values(table, name, score), color = name === "library size" ? GREY : BLUE;
      if (y.every(Number.isNaN)) continue;
      const drawn = dots([...y.keys()]);
      traces.push({
        name: plain(name), type: "scatter", mode: "markers", x: drawn.map((i) => table.mean_counts[i]), y: drawn.map((i) => y[i]),
        marker: { color, size: 6, opacity: table.names.length > 500 ? 0.3 : 0.55, symbol: color === GREY ? "x-thin-open" : "circle", line: { width: color === GREY ? 1.4 : 0 } },
        hoverinfo: "text",
        hovertext: drawn.map((i) => `${plain(table.names[i])}<br>${plain(name)}: ${number(y[i])}<br>${number(table.mean_counts[i], 2)} counts a spot`),
      });
      const line = { color, width: 3, dash: color === GREY ? "dash" : "solid" };
      traces.push({ ...running(table.mean_counts, y), mode: "lines", line, hoverinfo: "skip", showlegend: false });
    }
    draw("depth-plot", traces, {
      height: 400, xaxis: axis("mean counts of the gene in a spot", { type: "log", tickvals: COUNTS, ticktext: COUNTS }),
      yaxis: axis(plain(label(score)), { zeroline: true }),
    });
    const n = table ? dots(table.names).length : 0;
    find("depth-note").textContent = !traces.length ? "There are no values for this choice."
      : n < table.n_genes ? `${n} of ${table.n_genes} genes, evenly over their mean counts.` : "";
  }

  function ceiling() {
    const table = tableNow(), now = chosen();
    const score = CEILINGS.includes(now.score) ? now.score : CEILINGS[0];
    const y = table ? values(table, now.method, score) : [], x = table ? table.ceilings[score] ?? [] : [];
    const known = [...x.keys()].filter((i) => !Number.isNaN(x[i]) && !Number.isNaN(y[i]));
    const drawn = dots(known);
    const top = Math.max(0.1, ...known.map((i) => Math.max(x[i], y[i]))) * 1.05;
    const low = Math.min(-0.02, ...known.map((i) => y[i])) * 1.1;
    draw("ceiling-plot", known.length ? [{
      type: "scatter", mode: "markers", x: drawn.map((i) => x[i]), y: drawn.map((i) => y[i]),
      marker: { size: 8, opacity: 0.85, line: { width: 0.5, color: "#fff" }, ...byCounts(drawn.map((i) => table.mean_counts[i])) },
      hoverinfo: "text",
      hovertext: drawn.map((i) => `${plain(table.names[i])}<br>${number(y[i])} of at most ${number(x[i])}`),
    }] : [], {
      height: 440, showlegend: false,
      shapes: [{ type: "line", x0: 0, y0: 0, x1: top, y1: top, layer: "below", line: { color: GREY, dash: "dash" } }],
      xaxis: axis(`noise ceiling of the ${label(score)}`, { range: [0, top], constrain: "domain" }),
      yaxis: axis(label(score), { range: [low, top], scaleanchor: "x", constrain: "domain" }),
    });
    boxes(table, score, x);
    const median_part = known.length ? median(parts(x, y)) : NaN;
    const other = score === now.score ? "" : ` (the ${label(now.score)} has no ceiling)`;
    find("ceiling-finding").textContent = Number.isNaN(median_part) ? "There are no ceilings for this choice."
      : `Median gene, by ${now.method}: ${number(100 * median_part, 0)} % of its ceiling of the ${label(score)}${other}.`;
  }

  // Of genes whose ceiling is not mostly noise itself.
  const parts = (x, y) => [...x.keys()].filter((i) => x[i] > 0.1 && !Number.isNaN(y[i])).map((i) => y[i] / x[i]);

  function byCounts(counts) {
    const logs = counts.map((c) => Math.log10(Math.max(c, 1e-4))), sorted = [...logs].sort((a, b) => a - b);
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
    return {
      color: logs, colorscale: CIVIDIS, cmin: at(0.02), cmax: Math.max(at(0.98), at(0.02) + 0.1),
      colorbar: { title: { text: "mean counts", side: "right", font: { size: 12 } }, tickvals: COUNTS.map(Math.log10), ticktext: COUNTS, thickness: 10, outlinewidth: 0, len: 0.9 },
    };
  }

  function boxes(table, score, x) {
    const found = (table ? table.methods : []).map((m) => ({ method: m, parts: parts(x, values(table, m, score)) }))
      .filter((f) => f.parts.length).sort((a, b) => median(a.parts) - median(b.parts));
    draw("ceiling-boxes", found.map((f) => ({
      type: "box", orientation: "h", x: f.parts, y: f.parts.map(() => plain(f.method)), boxpoints: false, hoverinfo: "x",
      line: { color: f.method === chosen().method ? BLUE : BASELINES.includes(f.method) ? "#9aa3ad" : "#4d5864", width: 1.5 }, fillcolor: "#fff", width: 0.5,
    })), {
      height: Math.max(200, 90 + 34 * found.length), showlegend: false, margin: { l: 20, r: 16, t: 12, b: 48 },
      xaxis: axis("share of the ceiling", { range: [-0.6, 1.15], tickformat: ".0%" }), yaxis: { automargin: true, ticksuffix: " " },
    });
  }

  const COLUMNS = [
    ["gene", "Gene"], ["mean_counts", "Mean counts", 2], ["scc", "SCC"], ["depth_matched", "Depth-matched"],
    ["ceiling", "Its ceiling"], ["lift", "Lift"], ["p_value", "p", 4], ["q_value", "q", 4],
  ];
  let sorted = { column: "depth_matched", up: false };

  function column(table, method, name) {
    if (name === "gene") return table.names;
    if (name === "mean_counts") return table.mean_counts;
    if (name === "ceiling") return table.ceilings.depth_matched ?? [];
    return values(table, method, name);
  }

  function order(list) {
    const sign = sorted.up ? 1 : -1;
    const missing = (v) => v === undefined || Number.isNaN(v);
    return [...list.keys()].sort((a, b) => {
      if (missing(list[a]) || missing(list[b])) return missing(list[a]) - missing(list[b]);
      return sign * (typeof list[a] === "string" ? list[a].localeCompare(list[b]) : list[a] - list[b]);
    });
  }

  function head() {
    find("gene-table").tHead.rows[0].replaceChildren(...COLUMNS.map(([name, title]) => {
      const cell = element("th", "", { scope: "col", "data-column": name });
      const button = element("button", title, { type: "button" });
      button.addEventListener("click", () => {
        sorted = { column: name, up: sorted.column === name ? !sorted.up : ["gene", "p_value", "q_value"].includes(name) };
        genes();
      });
      cell.append(button);
      return cell;
    }));
  }

  const shownNumber = (value, digits) => (digits === 4 && value < 1e-4 ? "< 0.0001" : number(value, digits));

  function genes() {
    const table = tableNow(), { method } = chosen(), wanted = find("search").value.trim().toLowerCase();
    for (const cell of find("gene-table").tHead.rows[0].cells)
      cell.setAttribute("aria-sort", cell.dataset.column !== sorted.column ? "none" : sorted.up ? "ascending" : "descending");
    const columns = table ? COLUMNS.map(([name]) => column(table, method, name)) : [];
    const kept = table ? order(column(table, method, sorted.column)).filter((i) => table.names[i].toLowerCase().includes(wanted)) : [];
    find("gene-table").tBodies[0].replaceChildren(...kept.slice(0, MOST).map((i) => {
      const made = element("tr", ""), first = element("th", "", { scope: "row" });
      first.append(geneLink(table.names[i]));
      made.append(first, ...columns.slice(1).map((c, k) => element("td", shownNumber(c[i], COLUMNS[k + 1][2]))));
      return made;
    }));
    find("search-status").textContent = table ? `${kept.length} of ${table.names.length} genes${kept.length > MOST ? `, the first ${MOST} shown` : ""}` : "No genes for this choice";
  }

  function geneLink(gene) {
    if (!MAPPED.has(gene)) return document.createTextNode(gene);
    const button = element("button", gene, { type: "button", title: "Show its map" });
    button.addEventListener("click", () => {
      page.showGene(gene);
      find("maps").scrollIntoView();
      find("map-gene").focus({ preventScroll: true });
    });
    return button;
  }

  head();
  find("search").addEventListener("input", genes);
  page.parts.push(depth, ceiling, genes);
})();
