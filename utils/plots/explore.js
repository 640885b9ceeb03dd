// The propagation of an anchor, as in loss/propagation.py, and the page in explore.html that shows it.
const SETS = ["positives", "ambiguous", "negatives"];
const [POSITIVE, AMBIGUOUS, NEGATIVE, ANCHOR] = [0, 1, 2, 3];  // the anchor is in no set
const IGNORE = 255;  // no class
const LOWEST = -0.5, BINS = 75;  // of the histogram, which ends at 1
const COEFFICIENTS = ["initialcrit_pos", "initialcrit_amb", "prop_iter", "sigma_pos", "sigma_amb"];

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// f_j of N patches by axis, D x N float32 with D a multiple of 4, from `pack_features` in model/explore.py
async function unpackFeatures({ codes, scales, count }) {
  const stream = new Blob([bytes(codes)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = scales.length * count, bank = new Float32Array(4 * Math.ceil(scales.length / 4) * count);
  const squares = new Float64Array(count);
  for (let k = 0; k < size; k++) {
    const code = planes[k] | planes[size + k] << 8 | planes[2 * size + k] << 16;
    bank[k] = scales[Math.floor(k / count)] * (code >>> 1 ^ -(code & 1));  // odd codes are negative
    squares[k % count] += bank[k] ** 2;
  }
  for (let k = 0; k < size; k++) bank[k] /= Math.sqrt(squares[k % count]);  // unit length, as before rounding
  return bank;
}

// v . f_j of all patches, (N,)
function compare(proxy, bank) {
  const count = bank.length / proxy.length, similarity = new Float64Array(count);
  for (let i = 0; i < proxy.length; i += 4) {  // four axes at once are faster
    const [a, b, c, d] = proxy.subarray(i, i + 4);
    for (let j = 0, k = i * count; j < count; j++, k++)
      similarity[j] += a * bank[k] + b * bank[k + count] + c * bank[k + 2 * count] + d * bank[k + 3 * count];
  }
  return new Float32Array(similarity);
}

// the normalised mean of the positives, the anchor included; the proxy itself if there is none
function relocate(proxy, bank, similarity, phi) {
  const count = similarity.length, positives = new Uint32Array(count), sums = new Float64Array(proxy.length);
  let size = 0;
  for (let j = 0; j < count; j++) if (similarity[j] > phi) positives[size++] = j;
  if (!size) return proxy;
  for (let i = 0; i < sums.length; i += 4) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let n = 0; n < size; n++) {
      const k = i * count + positives[n];
      a += bank[k];
      b += bank[k + count];
      c += bank[k + 2 * count];
      d += bank[k + 3 * count];
    }
    sums.set([a, b, c, d], i);
  }
  const length = Math.hypot(...sums);
  return Float32Array.from(sums, (sum) => sum / length);
}

// similarity, boundaries and m_t of the patch `anchor` among `count` for t = 0..T
function propagate(bank, count, anchor, coefficients) {
  const steps = [];
  let { initialcrit_pos: phi, initialcrit_amb: psi } = coefficients, moved = 0;
  let proxy = Float32Array.from({ length: bank.length / count }, (_, i) => bank[i * count + anchor]);
  let similarity = compare(proxy, bank);
  for (let t = 0; ; t++) {
    steps.push({ phi, psi, moved, similarity, zones: zonesOf(similarity, phi, psi, anchor) });
    if (t >= coefficients.prop_iter) return steps;
    const relocated = relocate(proxy, bank, similarity, phi);
    if (relocated.every((value, i) => value === proxy[i])) moved = 0;
    else {
      moved = 1 - relocated.reduce((sum, value, i) => sum + value * proxy[i], 0);
      similarity = compare(relocated, bank);
    }
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
  const counts = new Uint32Array(BINS);
  const across = (value) => Math.min(Math.max((value - LOWEST) / (1 - LOWEST), 0), 1);
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

// red, green, blue and opacity of each id as one number; ids without a name are transparent
function paintOf(colours) {
  const paint = new Uint8Array(4 * 256);
  colours.forEach((colour, id) => paint.set([...colour, 150], 4 * id));
  return new Uint32Array(paint.buffer);
}

class Explorer {
  constructor(content, bank) {
    const { grid: [rows, columns], features: { count }, coefficients, layers, anchor } = content;
    Object.assign(this, { bank, count, rows, columns, layers, anchor, layer: "sets", t: Infinity, steps: [], timer: 0 });
    const numberOf = (value) => value === "inf" ? Infinity : value;  // JSON has no infinity
    this.coefficients = Object.fromEntries(COEFFICIENTS.map((key) => [key, numberOf(coefficients[key])]));
    this.images = [...document.querySelectorAll(".patches")];
    layers.sets.names = SETS;
    for (const layer of Object.values(layers)) {
      layer.paint = paintOf(layer.colours);
      if (layer.ids) layer.ids = bytes(layer.ids);  // all but the sets
    }
    COEFFICIENTS.forEach((key) => this.listenToSlider(find(key)));
    this.images.forEach((image, number) => this.listenToImage(image, number));
    this.listenToOthers();
    this.update();
  }

  // [image, row, column] of the anchor
  get position() {
    const patches = this.rows * this.columns, patch = this.anchor % patches;
    return [Math.floor(this.anchor / patches), Math.floor(patch / this.columns), patch % this.columns];
  }

  // after a change of t or the layer
  show() {
    const step = this.steps[this.t], layer = this.layers[this.layer], ids = layer?.ids ?? step.zones;
    this.images.forEach((image, number) => {
      const context = image.querySelector("canvas").getContext("2d");
      const pixels = context.createImageData(this.columns, this.rows);
      const painted = new Uint32Array(pixels.data.buffer), first = number * painted.length;
      for (let j = 0; layer && j < painted.length; j++) painted[j] = layer.paint[ids[first + j]];
      context.putImageData(pixels, 0, 0);
      image.classList.toggle("plain", !layer);
    });
    fillLegend(find("counts"), this.layers.sets, countsOf(step.zones), this.count - 1);
    fillLegend(find("names"), layer?.ids ? layer : { names: [] }, countsOf(ids), this.count);
    drawHistogram(step, this.layers.sets.colours);
    find("t").value = find("time").textContent = this.t;
    [...find("steps").rows].forEach((row, t) => row.classList.toggle("current", t === this.t));
  }

  // after a change of the anchor or a coefficient
  update() {
    const atEnd = this.t >= this.steps.length - 1, last = this.coefficients.prop_iter;
    this.steps = propagate(this.bank, this.count, this.anchor, this.coefficients);
    this.t = atEnd ? last : Math.min(this.t, last);
    find("t").max = last;
    const words = COEFFICIENTS.map((key) => {
      const text = this.coefficients[key] === Infinity ? "inf" : String(this.coefficients[key]);
      find(key).parentElement.querySelector("output").textContent = text;
      find(key).setAttribute("aria-valuetext", text);
      return `training_coeff.${key}=${text}`;
    });
    find("words").textContent = words.join(" ");
    find("copy").textContent = "Copy options";
    this.tabulate();
    this.markAnchor();
    this.show();
  }

  tabulate() {
    const { labels } = this.layers, cellOf = (cell) => `<td class="number">${cell}</td>`;
    find("steps").innerHTML = this.steps.map(({ phi, psi, moved, zones }, t) => {
      const cells = [t, ...[phi, psi, moved].map((value) => value.toFixed(4)), ...countsOf(zones).subarray(0, 3)];
      if (labels) cells.push(...quality(zones, labels.ids, this.anchor).map(percent));
      return `<tr>${cells.map(cellOf).join("")}</tr>`;
    }).join("");
  }

  markAnchor() {
    const [number, row, column] = this.position, image = this.images[number], { labels } = this.layers;
    const box = { left: column / this.columns, top: row / this.rows, width: 1 / this.columns, height: 1 / this.rows };
    for (const [side, share] of Object.entries(box)) find("anchor").style[side] = `${100 * share}%`;
    image.append(find("anchor"));
    const label = labels ? `, ${labels.names[labels.ids[this.anchor]] ?? "no label"}` : "";
    find("where").textContent = `row ${row}, column ${column} of ${image.dataset.name}${label}`;
  }

  moveTo(number, row, column) {
    this.anchor = (number * this.rows + clamp(row, this.rows)) * this.columns + clamp(column, this.columns);
    this.update();
  }

  showStep(t) {
    this.t = t;
    this.show();
  }

  play(playing) {
    clearInterval(this.timer);
    find("play").textContent = playing ? "Stop" : "Play";
    const advance = () => this.t < this.coefficients.prop_iter ? this.showStep(this.t + 1) : this.play(false);
    this.timer = playing ? setInterval(advance, 700) : 0;
  }

  listenToSlider(slider) {
    const logarithmic = slider.id.startsWith("sigma"), value = this.coefficients[slider.id];
    slider.value = logarithmic ? Math.log10(Math.min(value, 1e9)) : value;
    slider.addEventListener("input", () => {
      const chosen = logarithmic ? Number((10 ** slider.value).toPrecision(2)) : Number(slider.value);
      this.coefficients[slider.id] = logarithmic && slider.value === slider.max ? Infinity : chosen;
      this.update();
    });
  }

  listenToImage(image, number) {
    image.addEventListener("click", ({ clientX, clientY }) => {
      const { left, top, width, height } = image.getBoundingClientRect();
      const [x, y] = [(clientX - left) / width, (clientY - top) / height];
      this.moveTo(number, Math.floor(y * this.rows), Math.floor(x * this.columns));
    });
    image.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] };
      const [, row, column] = this.position, move = moves[event.key];
      if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      this.moveTo(number, row + move[0], column + move[1]);
    });
  }

  listenToOthers() {
    find("t").addEventListener("input", () => {
      this.play(false);
      this.showStep(Number(find("t").value));
    });
    find("play").addEventListener("click", () => {
      if (!this.timer) this.showStep(0);
      this.play(!this.timer);
    });
    find("layers").addEventListener("change", ({ target }) => {
      this.layer = target.value;
      this.show();
    });
    find("copy").addEventListener("click", async () => {
      getSelection().selectAllChildren(find("words"));  // to be copied by hand if the clipboard is unavailable
      await navigator.clipboard?.writeText(find("words").textContent);
      find("copy").textContent = "Copied";
    });
  }
}

if (typeof document !== "undefined") {
  const content = JSON.parse(find("content").textContent);
  new Explorer(content, await unpackFeatures(content.features));
  find("loading").hidden = true;
}
