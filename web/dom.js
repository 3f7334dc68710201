/** Elements, made in one expression. */

/** An element with these properties ("aria-…", "data-…" and role as attributes, on… as listeners) and children. */
export function element(tag, properties = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (/^(aria-|data-|role$)/.test(name)) found.setAttribute(name, value);
    else found[name] = value;
  }
  found.append(...children);
  return found;
}

/** Puts a style sheet of this folder into the page. */
export function style(file) {
  document.head.append(element("link", { rel: "stylesheet", href: new URL(file, import.meta.url).href }));
}
