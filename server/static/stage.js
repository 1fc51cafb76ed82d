// The pictures of one job: kept as they come, drawn at most once per animation frame, scrubbed and played again.

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const narrow = matchMedia("(max-width: 48rem)");
const KEPT_PIXELS = 2 ** 25; // decoded pictures are kept up to so many pixels, of four bytes each
const PLAY_MS = 66; // between two frames that are played
const CALM_MS = 1000; // between two that are shown live to somebody who asked for less motion
const GAP = 10, CAPTION = 22, SMALLEST = 48; // CSS pixels
const MOST_CAPTIONS = 20; // more pictures than this show their seeds only when pointed at

export class Stage {
  constructor(request) {
    Object.assign(this, { request, live: true, follows: true, playing: 0, place: 0, kept: 0, size: [32, 32] });
    this.pictures = { x_t: [], x0: [], image: [] }; // kind, index, step: {blob, bitmap}
    this.points = []; // steps after which something is shown, ascending
    this.levels = new Map(); // step: noise level
    this.tiles = Array.from({ length: request.n }, (_, index) => this.tile(request.seed + index));
    $("tiles").replaceChildren(...this.tiles.map((tile) => tile.figure));
    $("tiles").classList.toggle("dense", request.n > MOST_CAPTIONS);
    this.resized = new ResizeObserver(() => this.fit());
    this.resized.observe($("site"));
    this.draw();
  }

  tile(seed) {
    const figure = document.createElement("figure");
    figure.innerHTML = `<div class="pair" role="img"><canvas></canvas><canvas></canvas></div>
      <figcaption><a></a></figcaption>`;
    figure.firstChild.ariaLabel = `Seed ${seed}: the noisy picture, and the one predicted from it`;
    const link = figure.querySelector("a");
    link.textContent = `seed ${seed}`;
    const [x_t, x0] = figure.querySelectorAll("canvas");
    return { figure, x_t, x0, link, seed };
  }

  leave() {
    this.pause();
    this.resized.disconnect();
    this.left = true;
    for (const tile of this.tiles) URL.revokeObjectURL(tile.link.href);
    for (const kind of Object.values(this.pictures)) {
      for (const steps of kind) for (const picture of steps?.values() ?? []) this.drop(picture);
    }
  }

  add(header, bytes) {
    const { kind, index, step } = header;
    const picture = { blob: new Blob([bytes], { type: header.image_type }), bitmap: null };
    const steps = (this.pictures[kind][index] ??= new Map());
    this.drop(steps.get(step)); // a job that is made again sends it again
    steps.set(step, picture);
    if (kind !== "x0" || !this.levels.has(step)) this.levels.set(step, header.t);
    if (kind === "image") this.offer(this.tiles[index], picture.blob);
    if (!this.points.includes(step)) {
      const before = this.points.filter((point) => point < step).length;
      this.points.splice(before, 0, step);
      if (before <= this.place) this.place = Math.min(this.place + 1, this.points.length - 1);
    }
    if (this.follows) this.place = this.points.length - 1;
    this.draw();
  }

  drop(picture) {
    if (!picture?.bitmap) return;
    this.kept -= picture.bitmap.width * picture.bitmap.height;
    picture.bitmap.close();
    picture.bitmap = null;
  }

  offer({ link, seed }, blob) {
    URL.revokeObjectURL(link.href);
    const title = `Save the picture of seed ${seed}`;
    Object.assign(link, { href: URL.createObjectURL(blob), download: `${seed}.png`, title });
  }

  /** The newest picture of a kind up to a place. */
  newest(kind, index, place = this.points.length - 1) {
    const steps = this.pictures[kind][index];
    const step = steps && this.points.slice(0, place + 1).findLast((point) => steps.has(point));
    return steps?.get(step);
  }

  draw() {
    if (this.drawing) return;
    this.drawing = true;
    const paint = () => { this.drawing = false; if (!this.left) this.paint(); };
    if (calm.matches && this.live && this.follows) setTimeout(paint, CALM_MS);
    else requestAnimationFrame(paint);
  }

  paint() {
    const { place, points, tiles, request } = this;
    const last = place >= points.length - 1;
    tiles.forEach((tile, index) => {
      const image = last ? this.newest("image", index) : undefined;
      this.show(tile.x_t, this.newest("x_t", index, place) ?? image);
      this.show(tile.x0, image ?? this.newest("x0", index, place));
    });
    const where = `after ${points[place]} of ${request.steps} steps, t = ${this.levels.get(points[place])}`;
    const words = points.length === 0 ? "" : this.live && this.follows ? "live" : where; // live, each has its own step
    $("scrub").max = Math.max(0, points.length - 1);
    $("scrub").value = place;
    $("scrub").ariaValueText = $("point").textContent = words;
    $("play").textContent = this.playing ? "Pause" : "Play";
    $("play").disabled = $("scrub").disabled = points.length < 2;
  }

  async show(canvas, picture) {
    if (canvas.picture === picture) return;
    canvas.picture = picture;
    const context = canvas.getContext("2d");
    if (!picture) return context.clearRect(0, 0, canvas.width, canvas.height);
    const bitmap = picture.bitmap ?? (await createImageBitmap(picture.blob));
    if (this.left || canvas.picture !== picture) return bitmap.close();
    const { width, height } = bitmap;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.clearRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    if (picture.bitmap === null && this.kept + width * height <= KEPT_PIXELS) {
      picture.bitmap = bitmap;
      this.kept += width * height;
    } else if (picture.bitmap !== bitmap) bitmap.close(); // or it is held until the browser finds time
    if (this.size[0] !== width || this.size[1] !== height) {
      this.size = [width, height];
      this.fit();
    }
  }

  /** The largest size at which all pictures fit: whole device pixels per pixel, or else they would not be square. */
  fit() {
    const { request: { n }, size: [width, height] } = this;
    const room = narrow.matches ? innerHeight * 0.6 : Math.max(260, innerHeight - 420);
    const below = n > MOST_CAPTIONS ? 0 : CAPTION;
    const scales = Array.from({ length: 48 }, (_, i) => (48 - i) / devicePixelRatio).concat(0.25, 0.125);
    for (const [i, scale] of scales.entries()) {
      const most = Math.floor(($("tiles").clientWidth + GAP) / (2 * width * scale + 2 + GAP));
      const rows = Math.ceil(n / most);
      const fits = rows * (height * scale + below + GAP) <= room;
      const smallest = width * (scales[i + 1] ?? 0) < SMALLEST;
      if (most < 1 || (!fits && !smallest)) continue;
      const style = $("tiles").style;
      style.setProperty("--columns", Math.ceil(n / rows));
      style.setProperty("--width", `${width * scale}px`);
      style.setProperty("--height", `${height * scale}px`);
      return;
    }
  }

  /** Nothing more will come. */
  settle() {
    this.live = false;
    this.draw();
  }

  go(place) {
    this.place = Math.max(0, Math.min(place, this.points.length - 1));
    this.follows = this.place === this.points.length - 1;
    this.draw();
  }

  toggle() {
    if (this.playing) return this.pause();
    if (this.points.length < 2) return;
    if (this.place === this.points.length - 1) this.go(0);
    this.playing = setInterval(() => {
      this.go(this.place + 1);
      if (this.follows) this.pause();
    }, PLAY_MS);
    this.draw();
  }

  pause() {
    clearInterval(this.playing);
    this.playing = 0;
    this.draw();
  }
}
