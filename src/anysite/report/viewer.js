// The 3-D viewer: NiiVue and the volumes are unpacked when a case is first opened, and not before.
const viewer = document.getElementById("viewer");
const DIFFERENCES = [["missed", "#d55e00"], ["too much", "#56b4e9"], ["another class", "#f0e442"]];
const VOXELS_AT = 352; // bytes before the voxels of a NIfTI file without extensions

const inflate = async (element) => {
  const packed = Uint8Array.from(atob(element.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
};

const start = async () => {
  const probe = document.createElement("canvas").getContext("webgl2");
  if (!probe || !window.DecompressionStream) {
    throw new Error("This browser has no WebGL 2, which the 3-D viewer needs; the slices on the page stay.");
  }
  probe.getExtension("WEBGL_lose_context")?.loseContext();
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate(document.getElementById("viewer-script")));
  document.head.append(script);
  const nv = new window.niivue.Niivue({
    backColor: [0.043, 0.051, 0.063, 1],
    crosshairColor: [1, 1, 1, 0.55],
    crosshairWidth: 0.25, // of a voxel
    clipPlaneColor: [0, 0, 0, 0],
    dragAndDropEnabled: false,
    fontColor: [0.75, 0.78, 0.8, 1],
    isRadiologicalConvention: true,
    loadingText: "",
    logLevel: "error",
    multiplanarLayout: 2,
    multiplanarShowRender: 1,
    show3Dcrosshair: true,
    tileMargin: 2,
    viewModeHotKey: "",
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
  });
  await nv.attachToCanvas(document.getElementById("viewer-canvas"));
  return nv;
};

const compare = (truth, prediction) => {
  const differences = prediction.slice(0);
  const [was, said, result] = [truth, prediction, differences].map((buffer) => new Uint8Array(buffer, VOXELS_AT));
  for (let i = 0; i < result.length; i++) {
    result[i] = was[i] === said[i] ? 0 : said[i] === 0 ? 1 : was[i] === 0 ? 2 : 3;
  }
  return differences;
};

class Viewer {
  constructor() {
    this.controls = viewer.querySelector("#viewer-controls");
    this.message = viewer.querySelector(".message");
    this.controls.addEventListener("input", () => this.draw());
    for (const button of viewer.querySelectorAll("[data-step]")) {
      button.addEventListener("click", () => this.step(Number(button.dataset.step)));
    }
    // Before NiiVue, which would turn the view by these keys.
    viewer.addEventListener("keydown", (event) => {
      const by = { j: 1, k: -1 }[event.key];
      if (!by || event.target.matches("select")) return;
      event.preventDefault();
      event.stopPropagation();
      this.step(by);
    }, true);
    viewer.addEventListener("close", () => this.cases.choose(this.cases.current, true));
  }
  async open(cases) {
    this.cases = cases;
    if (!viewer.open) viewer.showModal();
    const { article } = cases;
    viewer.querySelector("#viewer-title").textContent = cases.current.dataset.case;
    viewer.querySelector("#viewer-text").textContent = article.querySelector(".open-viewer").dataset.text;
    try {
      this.nv ??= await start();
      this.parts = {};
      for (const part of article.querySelectorAll("script")) this.parts[part.dataset.part] = await inflate(part);
    } catch (error) {
      this.message.textContent = error.message;
      this.message.hidden = false;
      viewer.classList.add("failed");
      return;
    }
    const { truth, prediction } = this.parts;
    if (truth) this.parts.differences = compare(truth, prediction);
    for (const option of this.controls.elements.layer.options) {
      option.disabled = option.value !== "none" && !this.parts[option.value];
      if (option.disabled && option.selected) this.controls.elements.layer.value = "prediction";
    }
    await this.draw();
  }
  step(by) {
    const { cases } = this;
    const rows = cases.shown.filter((row) => cases.articles.get(row).querySelector(".open-viewer"));
    const place = rows.indexOf(cases.current) + by;
    if (!rows[place]) return;
    cases.choose(rows[place]);
    this.open(cases);
  }
  colours(layer) {
    if (layer === "none") return [];
    if (layer === "differences") return DIFFERENCES;
    return [...this.cases.section.querySelectorAll(".legend .swatch")].map((swatch) => [
      swatch.parentElement.textContent.trim(),
      getComputedStyle(swatch).getPropertyValue("--class").trim(),
    ]);
  }
  // One drawing at a time; what was asked for meanwhile is drawn afterwards.
  async draw() {
    this.again = true;
    if (this.drawing) return;
    this.drawing = true;
    while (this.again) {
      this.again = false;
      await this.drawOnce();
    }
    this.drawing = false;
  }
  async drawOnce() {
    const { nv, parts } = this;
    const [layer, view, opacity] = ["layer", "view", "opacity"].map((name) => this.controls.elements[name].value);
    const colours = this.colours(layer);
    const alone = view === "structures" && layer !== "none";
    for (const volume of [...nv.volumes]) nv.removeVolume(volume);
    const { NVImage } = window.niivue;
    nv.addVolume(await NVImage.new(parts.image.slice(0), "image.nii", "gray", alone ? 0 : 1));
    if (layer !== "none") {
      const overlay = await NVImage.new(parts[layer].slice(0), `${layer}.nii`, "gray", alone ? 1 : Number(opacity));
      const channel = (at) => [0, ...colours.map(([, colour]) => parseInt(colour.slice(at, at + 2), 16))];
      overlay.setColormapLabel({
        R: channel(1), G: channel(3), B: channel(5), A: [0, ...colours.map(() => 255)],
        I: [0, ...colours.map((_, index) => index + 1)], labels: ["", ...colours.map(([name]) => name)],
      });
      nv.addVolume(overlay);
    }
    nv.opts.show3Dcrosshair = !alone;
    nv.setScale(alone ? 1.8 : 1);
    nv.setSliceType(alone ? nv.sliceTypeRender : nv.sliceTypeMultiplanar);
    nv.drawScene();
    viewer.querySelector("#viewer-legend").replaceChildren(
      ...colours.map(([name, colour]) => {
        const [entry, swatch] = [document.createElement("span"), document.createElement("i")];
        swatch.className = "swatch";
        swatch.style.setProperty("--class", colour);
        entry.append(swatch, ` ${name}`);
        return entry;
      }),
    );
    viewer.dataset.drawn = `${this.cases.current.dataset.case} ${layer} ${view} ${opacity}`;
  }
}

const shared = new Viewer();
for (const button of document.querySelectorAll(".open-viewer")) {
  button.hidden = false;
  button.addEventListener("click", () => shared.open(listAt(button)));
}
