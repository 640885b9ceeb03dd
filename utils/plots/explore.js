// The propagation of an anchor, as in loss/propagation.py, and the page in explore.html that shows it.
const SETS = ["positives", "ambiguous", "negatives"];
const [POSITIVE, AMBIGUOUS, NEGATIVE, ANCHOR] = [0, 1, 2, 3];  // the anchor is in no set
const IGNORE = 255;  // no class
const LOWEST = -0.5, BINS = 75;  // of the histogram, which ends at 1
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

// f_j of N patches, N x D float32 with D a multiple of 4, from `pack_features` in model/explore.py
async function unpackFeatures({ codes, scales, count }) {
  const stream = new Blob([bytes(codes)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const dim = 4 * Math.ceil(scales.length / 4), size = count * scales.length;  // zeros fill a row
  const bank = new Float32Array(count * dim);
  for (let i = 0, k = 0; i < scales.length; i++)
    for (let j = 0; j < count; j++, k++) {
      const code = planes[k] | planes[size + k] << 8 | planes[2 * size + k] << 16;
      bank[j * dim + i] = scales[i] * (code >>> 1 ^ -(code & 1));  // even: not negative, odd: negative
    }
  for (let j = 0; j < count; j++) normalise(bank.subarray(j * dim, (j + 1) * dim));
  return bank;
}

// v . f_j of all patches, (N,)
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
  const zones = new Uint8Array(similarity.length);
  for (let j = 0; j < zones.length; j++)
    zones[j] = similarity[j] > phi ? POSITIVE : similarity[j] < psi ? NEGATIVE : AMBIGUOUS;
  zones[anchor] = ANCHOR;
  return zones;
}

function countsOf(ids) {
  const counts = new Uint32Array(256);
  for (const id of ids) counts[id]++;
  return counts;
}

// precision and recall of positives and purity of negatives; NaN if the anchor or all such patches have no label
function quality(zones, classes, anchor) {
  const own = classes[anchor], same = [0, 0, 0, 0], all = [0, 0, 0, 0];
  for (let j = 0; j < zones.length; j++) {
    if (own === IGNORE || classes[j] === IGNORE) continue;
    all[zones[j]]++;
    if (classes[j] === own) same[zones[j]]++;
  }
  const right = same[POSITIVE], wrong = same[NEGATIVE];
  return [right / all[POSITIVE], right / (right + same[AMBIGUOUS] + wrong), 1 - wrong / all[NEGATIVE]];
}

const find = (id) => document.getElementById(id);
const percent = (share) => Number.isFinite(share) ? `${(100 * share).toFixed(1)}%` : "–";
const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

// similarities of the bank; a gradient with hard stops at the boundaries colours the bars
function drawHistogram({ similarity, phi, psi }, colours) {
  const counts = new Uint32Array(BINS), across = (value) => (value - LOWEST) / (1 - LOWEST);
  for (const value of similarity) counts[clamp(Math.floor(BINS * across(value)), BINS)]++;
  const highest = Math.log1p(Math.max(...counts));
  const corner = (bin, count) => `${100 * bin / BINS}% ${100 - 100 * Math.log1p(count) / highest}%`;
  const corners = Array.from(counts, (count, bin) => `${corner(bin, count)}, ${corner(bin + 1, count)}`);
  find("bars").style.clipPath = `polygon(0 100%, ${corners}, 100% 100%)`;
  const [low, high] = [Math.min(psi, phi), phi].map((value) => `${100 * across(value)}%`);
  const [positive, ambiguous, negative] = colours.map((colour) => `rgb(${colour})`);
  find("bars").style.background =
    `linear-gradient(to right, ${negative} ${low}, ${ambiguous} ${low} ${high}, ${positive} ${high})`;
  for (const [id, value] of Object.entries({ phi, psi })) {
    find(id).hidden = !(value >= LOWEST && value <= 1);
    find(id).style.left = `${100 * across(value)}%`;
  }
}

function fillLegend(list, { names, colours }, counts, total) {
  list.replaceChildren(...names.map((name, id) => {
    const item = document.createElement("li"), value = document.createElement("b");
    item.style.setProperty("--c", `rgb(${colours[id]})`);
    item.hidden = !counts[id] && names !== SETS;
    value.textContent = ` ${counts[id].toLocaleString("en")} (${percent(counts[id] / total)})`;
    item.append(name, value);
    return item;
  }));
}

async function start() {
  const { grid: [rows, columns], features, coefficients, layers, anchor } = JSON.parse(find("content").textContent);
  const bank = await unpackFeatures(features), dim = bank.length / features.count, patches = rows * columns;
  layers.sets.names = SETS;
  for (const layer of Object.values(layers)) {
    const paint = new Uint8Array(4 * 256);  // red, green, blue and opacity; ids without a name are transparent
    layer.colours.forEach((colour, id) => paint.set([...colour, 150], 4 * id));
    layer.paint = new Uint32Array(paint.buffer);
    if (layer.ids) layer.ids = bytes(layer.ids);  // all but the sets
  }
  const state = { layer: "sets", t: Infinity, anchor };
  for (const key of COEFFICIENTS) state[key] = Number(coefficients[key]);
  const images = [...document.querySelectorAll(".patches")], sliders = COEFFICIENTS.map(find);
  const position = () => [Math.floor(state.anchor % patches / columns), state.anchor % columns];
  let steps = [], timer = 0;

  // another t or layer
  function show() {
    const step = steps[state.t], layer = layers[state.layer], ids = layer?.ids ?? step.zones;
    images.forEach((image, number) => {
      const context = image.querySelector("canvas").getContext("2d"), pixels = context.createImageData(columns, rows);
      const painted = new Uint32Array(pixels.data.buffer), first = number * patches;
      for (let j = 0; layer && j < patches; j++) painted[j] = layer.paint[ids[first + j]];
      context.putImageData(pixels, 0, 0);
      image.classList.toggle("plain", !layer);
    });
    fillLegend(find("counts"), layers.sets, countsOf(step.zones), features.count - 1);
    fillLegend(find("names"), layer?.ids ? layer : { names: [] }, countsOf(ids), features.count);
    drawHistogram(step, layers.sets.colours);
    find("t").value = find("time").textContent = state.t;
    [...find("steps").rows].forEach((row, t) => row.classList.toggle("current", t === state.t));
  }

  function tabulate() {
    find("steps").innerHTML = steps.map(({ phi, psi, moved, zones }, t) => {
      const cells = [t, ...[phi, psi, moved].map((value) => value.toFixed(4)), ...countsOf(zones).subarray(0, 3)];
      if (layers.labels) cells.push(...quality(zones, layers.labels.ids, state.anchor).map(percent));
      return `<tr>${cells.map((cell) => `<td class="number">${cell}</td>`).join("")}</tr>`;
    }).join("");
  }

  function placeAnchor() {
    const image = images[Math.floor(state.anchor / patches)], [row, column] = position();
    const box = { left: column / columns, top: row / rows, width: 1 / columns, height: 1 / rows };
    for (const [side, share] of Object.entries(box)) find("anchor").style[side] = `${100 * share}%`;
    image.append(find("anchor"));
    const label = layers.labels ? `, ${layers.labels.names[layers.labels.ids[state.anchor]] ?? "no label"}` : "";
    find("where").textContent = `row ${row}, column ${column} of ${image.dataset.name}${label}`;
  }

  // another anchor or coefficient
  function update() {
    const last = state.t >= steps.length - 1;
    steps = propagate(bank, dim, state.anchor, state);
    state.t = last ? state.prop_iter : Math.min(state.t, state.prop_iter);
    find("t").max = state.prop_iter;
    const shown = sliders.map(({ id }) => state[id] === Infinity ? "inf" : String(state[id]));
    sliders.forEach((slider, k) => {
      slider.parentElement.querySelector("output").textContent = shown[k];
      slider.setAttribute("aria-valuetext", shown[k]);
    });
    find("words").textContent = COEFFICIENTS.map((key, k) => `training_coeff.${key}=${shown[k]}`).join(" ");
    tabulate();
    placeAnchor();
    show();
  }

  function play(playing) {
    clearInterval(timer);
    find("play").textContent = playing ? "Stop" : "Play";
    timer = playing && setInterval(() => state.t < state.prop_iter ? go(state.t + 1) : play(false), 700);
  }

  function go(t) {
    state.t = t;
    show();
  }

  function moveTo(number, row, column) {
    state.anchor = number * patches + clamp(row, rows) * columns + clamp(column, columns);
    update();
  }

  for (const slider of sliders) {
    const logarithmic = slider.id.startsWith("sigma");  // the last position is infinity
    slider.value = logarithmic ? Math.log10(Math.min(state[slider.id], 1e9)) : state[slider.id];
    slider.addEventListener("input", () => {
      const value = logarithmic ? Number((10 ** slider.value).toPrecision(2)) : Number(slider.value);
      state[slider.id] = logarithmic && slider.value === slider.max ? Infinity : value;
      update();
    });
  }
  find("t").addEventListener("input", () => { play(false); go(Number(find("t").value)); });
  find("play").addEventListener("click", () => { go(timer ? state.t : 0); play(!timer); });
  find("layers").addEventListener("change", ({ target }) => { state.layer = target.value; show(); });
  find("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren(find("words"));  // to be copied by hand if the clipboard is unavailable
    await navigator.clipboard?.writeText(find("words").textContent);
    find("copy").textContent = "Copied";
  });
  images.forEach((image, number) => {
    const follow = ({ clientX, clientY }) => {
      const { left, top, width, height } = image.getBoundingClientRect();
      moveTo(number, Math.floor((clientY - top) / height * rows), Math.floor((clientX - left) / width * columns));
    };
    image.addEventListener("click", follow);
    image.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] };
      const [row, column] = position(), move = moves[event.key];
      if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      moveTo(number, row + move[0], column + move[1]);
    });
  });
  find("loading").hidden = true;
  update();
}

if (typeof document !== "undefined") start();
