// The pattern explorer of the docs site: the same patterns as nbs/03_patterns.ipynb, which the browser tests compare it with.
"use strict";
(() => {
  const MASK = (1n << 64n) - 1n, KEEP = (1n << 63n) - 1n;

  function hash(x) {  // SplitMix64's finaliser
    x = x * 0x9E3779B97F4A7C15n & MASK;
    x = (x ^ x >> 30n) * 0xBF58476D1CE4E5B9n & MASK;
    x = (x ^ x >> 27n) * 0x94D049BB133111EBn & MASK;
    return (x ^ x >> 31n) & KEEP;
  }

  function draw(i, p, window, global) {  // random blocks of row i, outside the window and the global blocks
    const candidates = Math.max(0, i - window + 1 - global), found = [], row = hash(hash(BigInt(i)) + BigInt(p.seed));
    const take = Math.min(p.random, candidates);
    for (let t = 0; t < take; t++) {
      const top = candidates - take + t, x = Number(hash(row + BigInt(t)) % BigInt(top + 1));
      found.push(found.includes(x) ? top : x);
    }
    return found.map(x => x + global);
  }

  const span = (lo, hi, step = 1) => [lo, hi, step];
  const local = (i, p) => [span(i - p.window + 1, i + 1)];
  const strided = (i, p) => [span(0, i + 1, p.stride)];
  const globals = (i, p) => [span(0, i < p.global ? i + 1 : p.global)];
  // name: [the parameters that it has, spans (start, stop, step) of row i, single blocks of row i]
  const PATTERNS = {
    dense: [[], i => [span(0, i + 1)]],
    local: [["window"], local],
    strided: [["stride"], strided],
    mixed: [["window", "stride"], (i, p) => [...local(i, p), ...strided(i, p)]],
    fixed: [["stretch", "summary"], (i, p) => [span(Math.floor(i / p.stretch) * p.stretch, i + 1),
      ...Array.from({length: Math.min(p.summary, p.stretch)}, (_, c) => span(p.stretch - 1 - c, i + 1, p.stretch))]],
    dilated: [["window", "dilation"], (i, p) => [span(i - (p.window - 1) * p.dilation, i + 1, p.dilation)]],
    sinks: [["sinks"], (i, p) => [span(0, p.sinks)]],
    longformer: [["window", "global"], (i, p) => [...local(i, p), ...globals(i, p)]],
    bigbird: [["window", "global", "random", "seed"], (i, p) => [...local(i, p), ...globals(i, p)], (i, p) => draw(i, p, p.window, p.global)],
  };

  function row(name, p, i) {  // visible key blocks of query block i, in order
    const seen = new Set(), [, spans, singles] = PATTERNS[name];
    for (let [lo, hi, step] of spans(i, p)) {
      if (lo < 0) lo += Math.ceil(-lo / step) * step;
      for (let j = lo; j < Math.min(hi, i + 1); j += step) seen.add(j);
    }
    for (const j of singles ? singles(i, p) : []) seen.add(j);
    return [...seen].sort((a, b) => a - b);
  }

  function measure(name, p, tokens, block, heads = 8, dim = 64) {  // whole sequences of blocks; operations count a diagonal block as half
    const n = Math.ceil(tokens / block);
    let visible = 0, diagonal = 0;
    for (let i = 0; i < n; i++) { const cols = row(name, p, i); visible += cols.length; diagonal += cols[cols.length - 1] === i; }
    const all = n * (n + 1) / 2, work = blocks => 4 * heads * dim * block * block * blocks;
    return {n, visible, density: visible / all, operations: work(visible - diagonal / 2), denseOperations: work(all - n / 2),
      memory: visible * block * block * heads * 2, denseMemory: all * block * block * heads * 2};
  }

  const CONTROLS = {window: [1, 16, 3], stride: [2, 32, 8], stretch: [2, 16, 4], summary: [1, 4, 1], dilation: [2, 8, 2], sinks: [1, 8, 1],
    global: [1, 8, 2], random: [0, 8, 3], seed: [0, 20, 0]};

  const unit = (x, units) => { let k = 0; while (x >= 1000 && k < units.length - 1) { x /= 1000; k++; } return `${x.toPrecision(3)} ${units[k]}`; };

  function picture(canvas, name, p, n) {
    const shown = Math.min(n, 64), size = Math.floor(canvas.width / shown), pen = canvas.getContext("2d"), gap = size > 5 ? 1 : 0;
    pen.fillStyle = "#ffffff"; pen.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < shown; i++) {
      const cols = new Set(row(name, p, i));
      for (let j = 0; j < shown; j++) {
        pen.fillStyle = !cols.has(j) ? "#eceff1" : j === i ? "#56b4e9" : "#0072b2";
        pen.fillRect(j * size, i * size, size - gap, size - gap);
      }
    }
    return shown;
  }

  function build(place) {
    const element = (tag, attributes = {}, ...inside) => {
      const e = Object.assign(document.createElement(tag), attributes);
      e.append(...inside);
      return e;
    };
    const values = Object.fromEntries(Object.entries(CONTROLS).map(([k, v]) => [k, v[2]]));
    const options = list => list.map(x => element("option", {value: x, textContent: Number(x) ? Number(x).toLocaleString("en") : x}));
    const kind = element("select", {id: "explorer-pattern"}, ...options(Object.keys(PATTERNS)));
    const tokens = element("select", {id: "explorer-tokens"}, ...options([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]));
    const block = element("select", {id: "explorer-block"}, ...options([16, 32, 64, 128]));
    kind.value = "bigbird"; tokens.value = 4096; block.value = 64;
    const label = (text, control) => element("label", {htmlFor: control.id}, element("span", {textContent: text}), control);
    const sliders = element("div"), canvas = element("canvas", {width: 448, height: 448}), table = element("table", {id: "explorer-result"});
    canvas.setAttribute("role", "img");

    function update() {
      const m = measure(kind.value, values, Number(tokens.value), Number(block.value));
      const shown = picture(canvas, kind.value, values, m.n);
      const written = PATTERNS[kind.value][0].map(k => `${k}=${values[k]}`).join(", ");
      canvas.setAttribute("aria-label", `Blocks that ${kind.value}(${written}) shows, the first ${shown} of ${m.n} rows; density ${(100 * m.density).toFixed(1)} %`);
      const rows = [["pattern", `${kind.value}(${written})`], ["blocks", `${m.visible.toLocaleString("en")} in ${m.n.toLocaleString("en")} rows`],
        ["density", `${(100 * m.density).toFixed(1)} %`], ["operations", `${unit(m.operations, ["", "thousand", "million", "G", "T"])} (dense: ${unit(m.denseOperations, ["", "thousand", "million", "G", "T"])})`],
        ["scores, if they were stored", `${unit(m.memory, ["B", "kB", "MB", "GB", "TB"])} (dense: ${unit(m.denseMemory, ["B", "kB", "MB", "GB", "TB"])})`]];
      table.replaceChildren(...rows.map(([a, b]) => element("tr", {}, element("th", {scope: "row", textContent: a}), element("td", {textContent: b}))));
    }

    function controls() {
      sliders.replaceChildren(...PATTERNS[kind.value][0].map(k => {
        const [min, max] = CONTROLS[k], out = element("output", {textContent: values[k]});
        const slider = element("input", {type: "range", id: `explorer-${k}`, min, max, value: values[k]});
        slider.addEventListener("input", () => { values[k] = Number(slider.value); out.textContent = slider.value; update(); });
        const made = label(k, slider);
        made.append(out);
        return made;
      }));
      update();
    }

    kind.addEventListener("change", controls);
    tokens.addEventListener("change", update);
    block.addEventListener("change", update);
    place.replaceChildren(element("div", {className: "explorer-controls"}, label("pattern", kind), sliders, label("tokens", tokens), label("block", block), table), canvas);
    controls();
  }

  globalThis.PatternExplorer = {row, measure, PATTERNS};
  const start = () => { const place = document.getElementById("explorer-place"); if (place) build(place); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
