// The propagation of an anchor, as in loss/propagation.py, and the page in explore.html that shows it.
const SETS = ["positives", "ambiguous", "negatives"];
const [POSITIVE, AMBIGUOUS, NEGATIVE, ANCHOR] = [0, 1, 2, 3];  // the anchor is in no set
const IGNORE = 255;  // no class
const COEFFICIENTS = ["initialcrit_pos", "initialcrit_amb", "prop_iter", "sigma_pos", "sigma_amb"];

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// scales a row of D values to unit length
function normalise(row) {
  let squares = 0;
  for (const value of row) squares += value * value;
  const length = Math.max(Math.sqrt(squares), 1e-12);
  for (let i = 0; i < row.length; i++) row[i] /= length;
  return row;
}

// f_j of N patches, N x D float32, from `pack_features` in model/explore.py
async function unpackFeatures({ codes, scales, count }) {
  const stream = new Blob([bytes(codes)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const dim = scales.length, size = count * dim, bank = new Float32Array(size);
  for (let i = 0, k = 0; i < dim; i++)
    for (let j = 0; j < count; j++, k++) {
      const code = planes[k] | planes[size + k] << 8 | planes[2 * size + k] << 16;
      bank[j * dim + i] = scales[i] * (code >>> 1 ^ -(code & 1));  // even: not negative, odd: negative
    }
  for (let j = 0; j < count; j++) normalise(bank.subarray(j * dim, (j + 1) * dim));
  return bank;
}

// v . f_j of all patches, (N,); D is a multiple of 4
function compare(proxy, bank) {
  const dim = proxy.length, similarity = new Float32Array(bank.length / dim);
  for (let j = 0, k = 0; j < similarity.length; j++) {
    let a = 0, b = 0, c = 0, d = 0;  // independent sums are faster
    for (let i = 0; i < dim; i += 4, k += 4) {
      a += proxy[i] * bank[k];
      b += proxy[i + 1] * bank[k + 1];
      c += proxy[i + 2] * bank[k + 2];
      d += proxy[i + 3] * bank[k + 3];
    }
    similarity[j] = a + b + c + d;
  }
  return similarity;
}

// the normalised mean of the positives, the anchor included; the proxy itself if there is none
function relocate(proxy, bank, similarity, phi) {
  const dim = proxy.length, sum = new Float64Array(dim);
  let size = 0;
  for (let j = 0; j < similarity.length; j++) {
    if (!(similarity[j] > phi)) continue;
    size++;
    for (let i = 0, k = j * dim; i < dim; i++, k++) sum[i] += bank[k];
  }
  return size ? Float32Array.from(normalise(sum)) : proxy;
}

// similarity, boundaries and m_t of the patch `anchor` for t = 0..T
function propagate(bank, dim, anchor, coefficients) {
  const steps = [];
  let { initialcrit_pos: phi, initialcrit_amb: psi } = coefficients, moved = 0;
  let proxy = bank.slice(anchor * dim, (anchor + 1) * dim);
  for (let t = 0; ; t++) {
    const similarity = compare(proxy, bank);
    steps.push({ t, phi, psi, moved, similarity, zones: zonesOf(similarity, phi, psi, anchor) });
    if (t >= coefficients.prop_iter) return steps;
    const relocated = relocate(proxy, bank, similarity, phi);
    moved = relocated === proxy ? 0 : 1 - relocated.reduce((sum, value, i) => sum + value * proxy[i], 0);
    phi -= moved / coefficients.sigma_pos;
    psi += moved / coefficients.sigma_amb;
    proxy = relocated;
  }
}

// the set of each patch, (N,); a patch of both sets is positive
function zonesOf(similarity, phi, psi, anchor) {
  const zones = Uint8Array.from(similarity, (s) => s > phi ? POSITIVE : s < psi ? NEGATIVE : AMBIGUOUS);
  zones[anchor] = ANCHOR;
  return zones;
}

function countsOf(ids) {
  const counts = new Uint32Array(256);
  for (const id of ids) counts[id]++;
  return counts;
}

// precision and recall of positives and purity of negatives; NaN without a labelled anchor or a patch to count
function quality(zones, classes, anchor) {
  const own = classes[anchor], same = [0, 0, 0], all = [0, 0, 0];
  for (let j = 0; j < zones.length; j++) {
    if (j === anchor || own === IGNORE || classes[j] === IGNORE) continue;
    all[zones[j]]++;
    if (classes[j] === own) same[zones[j]]++;
  }
  const right = same[POSITIVE], wrong = same[NEGATIVE];
  return [right / all[POSITIVE], right / (right + same[AMBIGUOUS] + wrong), 1 - wrong / all[NEGATIVE]];
}

const percent = (share) => Number.isFinite(share) ? `${(100 * share).toFixed(1)}%` : "–";
const find = (id) => document.getElementById(id);

function svgElement(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// similarities of the bank by set, stacked, counted on a logarithmic axis; and the boundaries
function drawHistogram({ similarity, zones, phi, psi }, lowest) {
  const [left, right, top, bottom, bins] = [6, 414, 18, 140, 68];
  const across = (value) => left + (value - lowest) / (1 - lowest) * (right - left);
  const counts = new Float64Array(bins * SETS.length);
  similarity.forEach((value, j) => {
    const bin = Math.min(bins - 1, Math.max(0, Math.floor((value - lowest) / (1 - lowest) * bins)));
    if (zones[j] !== ANCHOR) counts[bin * SETS.length + zones[j]]++;
  });
  const below = (bin, zone) => counts.subarray(bin * SETS.length, bin * SETS.length + zone).reduce((a, b) => a + b, 0);
  const highest = Math.log(1 + Math.max(...Array.from({ length: bins }, (_, bin) => below(bin, SETS.length))));
  const up = (count) => bottom - Math.log(1 + count) / highest * (bottom - top);
  const width = (right - left) / bins, parts = [];
  SETS.forEach((name, zone) => {
    let outline = "";
    for (let bin = 0; bin < bins; bin++) {
      const [low, high] = [up(below(bin, zone)), up(below(bin, zone + 1))];
      if (low > high) outline += `M${left + bin * width} ${low}V${high}h${width}V${low}z`;
    }
    parts.push(svgElement("path", { class: name, d: outline }));
  });
  parts.push(svgElement("line", { class: "rule", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (let tick = Math.ceil(4 * lowest) / 4; tick <= 1; tick += 0.25)
    parts.push(svgElement("text", { x: Math.min(across(tick), right - 4), y: bottom + 16, "text-anchor": "middle" }, tick));
  for (const [name, value] of [["Φ", phi], ["Ψ", psi]]) {
    if (!(value >= lowest && value <= 1)) continue;
    const [x, dashes] = [across(value), name === "Φ" ? "none" : "5 3"];
    parts.push(svgElement("line", { class: "edge", x1: x, x2: x, y1: top - 4, y2: bottom, "stroke-dasharray": dashes }));
    parts.push(svgElement("text", { x, y: top - 7, "text-anchor": "middle" }, name));
  }
  find("histogram").replaceChildren(...parts);
}

async function start() {
  const content = JSON.parse(find("content").textContent), [rows, columns] = content.grid, patches = rows * columns;
  const bank = await unpackFeatures(content.features), dim = bank.length / content.features.count;
  const layers = content.layers;  // of ids, except the sets
  for (const layer of Object.values(layers)) {
    if (layer.ids) layer.ids = bytes(layer.ids);
    layer.paint = new Uint8ClampedArray(4 * 256);  // transparent unless an id has a name
    layer.colours.forEach((colour, id) => layer.paint.set([...colour, 150], 4 * id));
  }
  const state = { layer: "sets", t: 0, anchor: content.anchor };
  for (const key of COEFFICIENTS) state[key] = Number(content.coefficients[key]);
  const images = [...document.querySelectorAll(".patches")], inputs = COEFFICIENTS.map((key) => find(key));
  let steps = [], timer = 0;

  function fill(list, layer, ids) {
    const counts = countsOf(ids), total = ids.length - (layer === layers.sets);  // without the anchor
    list.replaceChildren(...layer.names.flatMap((name, id) => {
      if (!counts[id] && layer !== layers.sets) return [];
      const item = document.createElement("li"), value = document.createElement("b");
      item.style.setProperty("--c", `rgb(${layer.colours[id].join()})`);
      value.textContent = ` ${counts[id].toLocaleString("en")} (${percent(counts[id] / total)})`;
      item.append(name, value);
      return item;
    }));
  }

  function show() {
    const step = steps[state.t], layer = layers[state.layer], ids = layer ? layer.ids ?? step.zones : null;
    images.forEach((image, number) => {
      const context = image.querySelector("canvas").getContext("2d"), pixels = context.createImageData(columns, rows);
      image.classList.toggle("plain", !ids);
      for (let j = 0, k = number * patches; ids && j < patches; j++, k++)
        pixels.data.set(layer.paint.subarray(4 * ids[k], 4 * ids[k] + 4), 4 * j);
      context.putImageData(pixels, 0, 0);
    });
    fill(find("counts"), layers.sets, step.zones);
    find("names").hidden = !layer?.ids;
    if (layer?.ids) fill(find("names"), layer, ids);
    drawHistogram(step, Math.floor(10 * Math.min(...steps.map((each) => each.similarity.reduce((a, b) => Math.min(a, b))))) / 10);
    find("time").textContent = find("t").value = state.t;
    [...find("steps").rows].forEach((row, t) => row.classList.toggle("current", t === state.t));
  }

  function tabulate() {
    const cell = (text) => `<td class="number">${text}</td>`;
    find("steps").innerHTML = steps.map(({ t, phi, psi, moved, zones }) => {
      const counts = countsOf(zones), numbers = [t, phi.toFixed(4), psi.toFixed(4), moved.toFixed(4)];
      numbers.push(...SETS.map((_, zone) => counts[zone].toLocaleString("en")));
      if (layers.labels) numbers.push(...quality(zones, layers.labels.ids, state.anchor).map(percent));
      return `<tr>${numbers.map(cell).join("")}</tr>`;
    }).join("");
  }

  function placeAnchor() {
    const number = Math.floor(state.anchor / patches), [row, column] = positionOf(state.anchor);
    const marker = find("anchor"), own = layers.labels?.ids[state.anchor];
    images[number].append(marker);
    const box = { left: column / columns, top: row / rows, width: 1 / columns, height: 1 / rows };
    for (const [side, share] of Object.entries(box)) marker.style[side] = `${100 * share}%`;
    const words = layers.labels ? `, ${layers.labels.names[own] ?? "not labelled"}` : "";
    find("where").textContent = `row ${row}, column ${column} of ${images[number].dataset.name}${words}`;
  }

  const positionOf = (patch) => [Math.floor(patch % patches / columns), patch % columns];
  const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

  function update() {
    const atEnd = state.t === steps.length - 1 || !steps.length, started = performance.now();
    steps = propagate(bank, dim, state.anchor, state);
    state.t = atEnd ? state.prop_iter : Math.min(state.t, state.prop_iter);
    find("t").max = state.prop_iter;
    inputs.forEach((input) => {
      const value = state[input.id], text = value === Infinity ? "∞" : String(value);
      input.previousElementSibling.querySelector("output").textContent = text;
      input.setAttribute("aria-valuetext", text);
    });
    const word = (key) => `training_coeff.${key}=${state[key] === Infinity ? "inf" : state[key]}`;
    find("words").textContent = COEFFICIENTS.map(word).join(" ");
    tabulate();
    placeAnchor();
    show();
    document.body.dataset.milliseconds = (performance.now() - started).toFixed(1);
  }

  function play(playing) {
    clearInterval(timer);
    find("play").textContent = playing ? "Stop" : "Play";
    timer = playing && setInterval(() => {
      if (state.t < state.prop_iter) state.t++;
      else play(false);
      show();
    }, 700);
  }

  for (const input of inputs) {
    const logarithmic = input.id.startsWith("sigma");  // the last position is infinity
    input.value = logarithmic ? Math.log10(Math.min(state[input.id], 1000)) : state[input.id];
    input.addEventListener("input", () => {
      const power = Number((10 ** input.value).toPrecision(2));
      state[input.id] = !logarithmic ? Number(input.value) : input.value === input.max ? Infinity : power;
      update();
    });
  }
  find("t").addEventListener("input", (event) => {
    play(false);
    state.t = Number(event.target.value);
    show();
  });
  find("play").addEventListener("click", () => {
    const playing = find("play").textContent === "Play";
    if (playing) state.t = 0;
    show();
    play(playing);
  });
  find("layers").addEventListener("change", (event) => {
    state.layer = event.target.value;
    show();
  });
  find("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren(find("words"));
    await navigator.clipboard?.writeText(find("words").textContent);
    find("copy").textContent = "Copied";
    setTimeout(() => { find("copy").textContent = "Copy options"; }, 1500);
  });
  images.forEach((image, number) => {
    const moveTo = (row, column) => {
      const patch = number * patches + clamp(row, rows) * columns + clamp(column, columns);
      if (patch === state.anchor) return;
      state.anchor = patch;
      update();
    };
    const follow = (event) => {
      const area = image.getBoundingClientRect();
      const [x, y] = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
      moveTo(Math.floor(y * rows), Math.floor(x * columns));
    };
    image.addEventListener("click", follow);
    image.addEventListener("pointermove", (event) => { if (event.buttons === 1 && event.pointerType === "mouse") follow(event); });
    image.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0], " ": [0, 0] };
      const [row, column] = positionOf(state.anchor), move = moves[event.key];
      if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      moveTo(row + move[0], column + move[1]);
    });
  });
  find("loading").hidden = true;
  update();
}

if (typeof document !== "undefined") start();
