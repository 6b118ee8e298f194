// The body of a function that browser_access_test.go runs in a page: what is wrong with how it looks now, a line each.
// Its argument names what to judge: "names", "contrast", "focus", "sizes" or "touch".

const found = [];
const isShown = node => node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
const name = node => `${node.tagName.toLowerCase()}${node.id && `#${node.id}`}.${node.className.baseVal ?? node.className}` +
  ` "${(node.ariaLabel ?? node.textContent).replace(/\s+/g, " ").slice(0, 30)}"`;
const report = (node, what) => found.push(`${name(node)}: ${what}`);
const scope = document.querySelector("dialog[open], :popover-open, .menu[open], #choices:not([hidden])") ?? document.body;
const controls = [...scope.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex='0']")]
  .filter(node => isShown(node) && node.tabIndex >= 0 && !node.closest("[inert]"));

// ---- colours ----

const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

function rgba(colour) {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].map((n, i) => i < 3 ? n : n / 255);
}

const over = ([r, g, b, a], under) => [r, g, b].map((n, i) => n * a + under[i] * (1 - a)).concat(1);

function backgroundOf(node) {
  const own = rgba(getComputedStyle(node).backgroundColor);
  return own[3] === 1 ? own : over(own, node.parentElement ? backgroundOf(node.parentElement) : rgba("canvas"));
}

function luminance(colour) {
  const [r, g, b] = colour.map(n => n / 255 <= 0.04045 ? n / 255 / 12.92 : ((n / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function ratio(a, b) {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
}

function judge(node, colour, least, what) {
  const background = backgroundOf(node), ink = rgba(colour);
  for (let at = node; at; at = at.parentElement) ink[3] *= Number(getComputedStyle(at).opacity);
  const got = ratio(over(ink, background), background);
  if (got < least) report(node, `${what} has a contrast of ${got.toFixed(2)}, not ${least}`);
}

function judgeContrast() {
  const walker = document.createTreeWalker(scope, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node), size = parseFloat(style.fontSize);
    range.selectNode(walker.currentNode);
    if (/^[\p{Extended_Pictographic}\ufe0f\s]*$/u.test(walker.currentNode.data) || !isShown(node) || node.closest("option, .unseen, :disabled") ||
      range.getBoundingClientRect().width < 2) continue;
    judge(node, style.color, size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5, "text");
  }
  for (const field of controls.filter(node => node.placeholder && !node.value)) judge(field, getComputedStyle(field, "::placeholder").color, 4.5, "placeholder");
}

// The browser draws a ring around what has the focus by a key.
function judgeFocus() {
  const had = document.activeElement;
  had.blur();
  for (const node of controls) {
    node.focus({ focusVisible: true });
    const style = getComputedStyle(node);
    if (document.activeElement !== node) report(node, "cannot have the focus");
    else if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) report(node, "has no ring");
    else judge(node.parentElement, style.outlineColor, 3, `the ring of ${name(node)}`);
  }
  had.focus();
}

// ---- names ----

function judgeNames() {
  const ids = [...document.querySelectorAll("[id]")].map(node => node.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) found.push(`the id ${id} is there more than once`);
  for (const attribute of ["aria-controls", "aria-labelledby", "aria-describedby", "aria-activedescendant"]) {
    for (const node of document.querySelectorAll(`[${attribute}]`)) {
      const target = document.getElementById(node.getAttribute(attribute));
      if (!target || attribute === "aria-activedescendant" && target.role !== "option") report(node, `${attribute} leads nowhere`);
    }
  }
  for (const node of document.querySelectorAll("[aria-hidden=true] :is(a, button), a[aria-hidden=true]")) if (node.tabIndex >= 0) report(node, "is hidden, but not from Tab");
  const headings = document.querySelectorAll("h1").length;
  if (headings !== 1) found.push(`${headings} h1`);
}

// ---- sizes ----

function judgeSizes() {
  if (document.documentElement.scrollWidth > innerWidth) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const node of scope.querySelectorAll("*")) {
    if (!isShown(node) || node.closest("svg, .unseen, option")) continue;
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (/auto|scroll/.test(style.overflowX) && node.scrollWidth > node.clientWidth && node.tagName !== "PRE") report(node, `scrolls ${node.scrollWidth} in ${node.clientWidth} sideways`);
    if ((box.right > innerWidth + 1 || box.left < -1) && box.width > 1 && !node.closest("pre, #side, .skip")) report(node, `reaches from ${box.left} to ${box.right}`);
  }
  for (const node of controls.filter(node => !node.matches(".skip"))) {
    node.scrollIntoView({ block: "center", behavior: "instant" });
    const { left, top, width, height } = node.getClientRects()[0], x = left + width / 2, y = top + height / 2, hit = document.elementFromPoint(x, y);
    if (!hit || !node.contains(hit) && !hit.closest("label")?.contains(node) && !node.matches("#messages")) report(node, `is covered by ${hit && name(hit)}`);
  }
}

// A link within a text is as high as its line.
function judgeTouch() {
  for (const node of controls) {
    const { width, height } = (node.closest("label") ?? node).getBoundingClientRect();
    const inText = node.matches("a") && node.closest(".body, .head, .mark, .hint, .rows p");
    if (!inText && !node.matches(".skip") && (width < 44 || height < 44)) report(node, `is ${width.toFixed()} × ${height.toFixed()}`);
  }
}

({ names: judgeNames, contrast: judgeContrast, focus: judgeFocus, sizes: judgeSizes, touch: judgeTouch })[arguments[0]]();
return [...new Set(found)].slice(0, 15).join("\n");
