// What stands in messages between markers: format.go for browsers, function by function. testdata/format.txt says what
// both make of a text. Nothing but elements made here and textContent gets into the page.

const marks = { "*": ["em"], _: ["em"], "~~": ["del"], "**": ["strong"], "***": ["em", "strong"] }; // innermost first

const blocks = /(?<![^\n])(?:```[\w+#.-]*[ \t\r]*\n((?:[^\n]*\n)*?(?:[^\n]*$)??)(?:```[ \t\r]*(?![^\n])|$)|> [^\n]*(?:\n>(?: [^\n]*)?(?![^\n]))*)/g;
const quotes = /(?<![^\n])> ?/g;
const scheme = /^https?:\/\//i;

// One character each.
const space = /\p{White_Space}/u, word = /[0-9A-Za-z]/, namePart = /[\p{L}\p{M}\p{Nd} ._-]/u;
const nameEdge = /\p{sc=Han}|[^\p{L}\p{M}\p{N}._-]/u;
const endsLink = new RegExp("[\\p{White_Space}\\p{Cc}\\p{Cf}\\p{sc=Han}\\p{sc=Hiragana}\\p{sc=Katakana}\\p{sc=Hangul}\\p{sc=Bopomofo}" +
  "\"<>`\\u2014\\u2018-\\u201f\\u2026\\u3000-\\u303f\\ufe30-\\ufe6f\\uff00-\\uffef]", "u");
const maxName = 32;

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Returns a DocumentFragment of a message. me is who reads it; known(name) says which other names are somebody's, in any case.
export function format(text, me, known) {
  const all = document.createDocumentFragment();
  // As Go's EqualFold. Of what a name consists of, only the dot means something here.
  const mine = new RegExp(`^(?:${me.replaceAll(".", "\\.")}|all|所有人)$`, "iu");
  const classOf = name => mine.test(name) ? "mention me" : known(name) ? "mention" : "";
  let end = 0; // of the last block
  for (const { 0: block, 1: content, index } of text.matchAll(blocks)) {
    all.append(...inline(text.slice(end, index).replace(/(?<!\n)\n+$/, ""), classOf));
    if (content !== undefined) all.append(make("pre", {}, make("code", {}, content.replace(/\n$/, ""))));
    else all.append(make("blockquote", {}, ...inline(block.replace(quotes, ""), classOf)));
    end = index + block.length;
    while (text[end] === "\n") end++;
  }
  all.append(...inline(text.slice(end), classOf));
  return all;
}

// Returns the nodes of text that has no blocks.
function inline(text, classOf) {
  const s = [..."\n" + text + "\n"]; // so that every character has neighbours
  const nodes = [], open = new Map(); // marker → where in nodes it is that nothing has closed; of each the last
  let plain = 1; // from here on nothing is in nodes
  const flush = (end, next) => {
    if (end > plain) nodes.push(s.slice(plain, end).join(""));
    plain = next;
  };
  for (let i = 1, end; i < s.length - 1; i = end) {
    let node = null;
    end = i + 1;
    switch (s[i]) {
      case "\n": open.clear(); break;
      case "`": [node, end] = code(s, i); break;
      case "@": [node, end] = mention(s, i, classOf); break;
      case "h": case "H": [node, end] = link(s, i); break;
      case "*": case "_": case "~": {
        end = runEnd(s, i);
        const mark = s.slice(i, end).join(""), at = open.get(mark), inWord = c => end - i === 1 && word.test(c);
        if (at !== undefined && !space.test(s[i - 1]) && !inWord(s[end])) {
          flush(i, end);
          [nodes[at]] = marks[mark].reduce((inner, tag) => [make(tag, {}, ...inner)], nodes.splice(at + 1));
          for (const [other, inside] of open) if (inside >= at) open.delete(other);
        } else if (marks[mark] && !space.test(s[end]) && !inWord(s[i - 1])) {
          flush(i, end);
          open.set(mark, nodes.push(mark) - 1);
        }
      }
    }
    if (node) {
      flush(i, end);
      nodes.push(node);
    }
  }
  flush(s.length - 1);
  return nodes;
}

function runEnd(s, i) {
  let end = i;
  while (s[end] === s[i]) end++;
  return end;
}

// code, link and mention return what stands at i and its end, or null and the end of what is text.
function code(s, i) {
  const start = runEnd(s, i);
  for (let j = start, end; s[j] !== "\n"; j = end) {
    end = runEnd(s, j);
    if (s[j] !== "`" || end - j !== start - i) continue;
    if (space.test(s[start]) || space.test(s[j - 1])) break;
    return [make("code", {}, s.slice(start, j).join("")), end];
  }
  return [null, start];
}

function link(s, i) {
  const start = i + (scheme.exec(s.slice(i, i + 8).join(""))?.[0].length ?? 0);
  if (start === i || word.test(s[i - 1])) return [null, i + 1];
  const open = { ")": 0, "]": 0, "}": 0 }; // brackets in the link, by what closes them
  let end = start;
  for (let j = start; !endsLink.test(s[j]); j++) {
    if ("([{".includes(s[j])) open[")]}"["([{".indexOf(s[j])]]++;
    if (open[s[j]] > 0) {
      open[s[j]]--;
      end = j + 1;
    } else if (!".,;:!?'*_~)]}".includes(s[j])) end = j + 1;
  }
  if (end === start) return [null, i + 1];
  const href = s.slice(i, end).join("");
  return [make("a", { href, rel: "noopener noreferrer nofollow", target: "_blank" }, href), end];
}

function mention(s, i, classOf) {
  let end = i + 1;
  while (namePart.test(s[end]) && end <= i + maxName) end++;
  for (; nameEdge.test(s[i - 1]) && end > i + 1; end--) {
    let after = end;
    while ("_.-".includes(s[after])) after++;
    const name = s.slice(i + 1, end).join(""), className = nameEdge.test(s[after]) && classOf(name);
    if (className) return [make("span", { class: className }, `@${name}`), end];
  }
  return [null, i + 1];
}
