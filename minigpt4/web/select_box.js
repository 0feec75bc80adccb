() => {
  // A box is dragged over the picture while body.selecting is set. It goes as percents into the text field #box.
  let start = null;
  let box = null;
  const frame = document.createElement("div");
  frame.id = "box_frame";
  document.body.append(frame);

  const picture = () => document.querySelector("#picture .image-frame img, #picture img");

  // The place of the pixels: an <img> with object-fit leaves stripes on two sides.
  const area = (image) => {
    const outer = image.getBoundingClientRect();
    let scale = Math.min(outer.width / image.naturalWidth, outer.height / image.naturalHeight);
    if (getComputedStyle(image).objectFit === "scale-down") scale = Math.min(scale, 1);
    const width = image.naturalWidth * scale;
    const height = image.naturalHeight * scale;
    return { left: outer.left + (outer.width - width) / 2, top: outer.top + (outer.height - height) / 2, width, height };
  };

  const percents = (event, image) => {
    const inside = area(image);
    const part = (value, from, length) => Math.round(Math.min(1, Math.max(0, (value - from) / length)) * 100);
    return [part(event.clientX, inside.left, inside.width), part(event.clientY, inside.top, inside.height)];
  };

  const draw = () => {
    const image = picture();
    if (!box || !image || !document.body.classList.contains("selecting")) {
      frame.style.display = "none";
      return;
    }
    const inside = area(image);
    Object.assign(frame.style, {
      display: "block",
      left: `${window.scrollX + inside.left + (box[0] / 100) * inside.width}px`,
      top: `${window.scrollY + inside.top + (box[1] / 100) * inside.height}px`,
      width: `${((box[2] - box[0]) / 100) * inside.width}px`,
      height: `${((box[3] - box[1]) / 100) * inside.height}px`,
    });
  };

  const write = (text) => {
    const field = document.querySelector("#box textarea, #box input");
    if (!field) return;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  document.addEventListener("pointerdown", (event) => {
    const image = picture();
    if (!image || event.target !== image || !document.body.classList.contains("selecting")) return;
    event.preventDefault();
    start = percents(event, image);
  });
  document.addEventListener("pointermove", (event) => {
    const image = picture();
    if (!start || !image) return;
    event.preventDefault();
    const [x, y] = percents(event, image);
    box = [Math.min(start[0], x), Math.min(start[1], y), Math.max(start[0], x), Math.max(start[1], y)];
    draw();
  });
  const finish = () => {
    if (!start) return;
    start = null;
    if (box && box[0] < box[2] && box[1] < box[3]) write(`{<${box.join("><")}>}`);
  };
  document.addEventListener("pointerup", finish);
  document.addEventListener("pointercancel", finish);
  document.addEventListener("dragstart", (event) => {
    if (event.target === picture() && document.body.classList.contains("selecting")) event.preventDefault();
  });
  // A box that was typed is shown too; one that was taken away vanishes.
  document.addEventListener("input", (event) => {
    if (!event.target.closest?.("#box")) return;
    const numbers = event.target.value.match(/\d+/g);
    box = numbers?.length === 4 ? numbers.map(Number) : null;
    draw();
  });
  window.addEventListener("resize", draw);
  window.addEventListener("scroll", draw, true);
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  window.forgetBox = () => {
    box = null;
    draw();
  };
}
