// What a reader would stumble over in the page that is open, as sentences; none for a page that is legible.
// Text on top of drawings (numbers in the cells of a matrix, names on photographs) is left out of the contrasts: what is
// behind it is no style that could be read. Names on photographs may overlap, as the objects do.
(() => {
  const problems = [];
  const say = (what, element, more = "") =>
    problems.push(`${what}: ${(element.textContent || element.tagName).trim().slice(0, 60)} ${more}`.trim());

  const rgba = (colour) => {
    const [red, green, blue, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = (front, back) => front.slice(0, 3).map((c, i) => c * front[3] + back[i] * (1 - front[3]));
  const backdrop = (element) => {
    if (!element) return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, backdrop(element.parentElement));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (first, second) => {
    const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    problems.push(`page wider than the window: ${root.scrollWidth} in ${root.clientWidth}`);
  }

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const range = document.createRange();
    range.selectNodeContents(node);
    const unseen = !range.getClientRects().length || element.closest("style, script, title, [aria-hidden]");
    if (!node.data.trim() || unseen) continue;
    const style = getComputedStyle(element);
    const drawing = element.closest("svg");
    const scale = drawing ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < 9.5) say("small text", element, `${size.toFixed(1)} px`);
    const onDrawing = drawing && (drawing.matches(".picture") || style.fill !== getComputedStyle(drawing).color);
    if (!onDrawing) {
      const back = backdrop(drawing || element);
      const found = contrast(over(rgba(drawing ? style.fill : style.color), back), back);
      if (found < 4.5) say("faint text", element, found.toFixed(2));
    }
  }

  for (const drawing of document.querySelectorAll("svg")) {
    const frame = drawing.getBoundingClientRect();
    const texts = [...drawing.querySelectorAll("text")].map((element) => [element, element.getBoundingClientRect()]);
    for (const [element, box] of texts) {
      const out = Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom);
      if (out > 1) say("clipped text", element, `by ${out.toFixed(1)} px in ${drawing.getAttribute("aria-label")}`);
    }
    if (drawing.matches(".picture")) continue;
    texts.forEach(([element, box], i) => {
      for (const [other, its] of texts.slice(i + 1)) {
        const width = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const height = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (width > 1 && height > 2) say("overlapping text", element, `and ${other.textContent}`);
      }
    });
  }
  return problems;
})();
