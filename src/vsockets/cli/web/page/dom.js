// Elements that stay what they are while what they show changes, so that the focus stays, too.

const SVG = "http://www.w3.org/2000/svg";

/** A new HTML element with these properties and children. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** A new SVG element with these attributes and children. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  place(element, attributes);
  element.append(...children);
  return element;
}

/** Set attributes of an SVG element. */
export function place(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

/** Set the text of an element, if it is another. */
export function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** Show or hide an element with a text; "" hides it. */
export function tell(element, text) {
  say(element, text);
  element.hidden = text === "";
}

/**
 * Make the children of `parent` those of `items`, in this order.  `key` tells items apart,
 * `begin` makes an item's element, `update` is called with it and the item each time.
 */
export function keep(parent, items, key, begin, update) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = before.get(name);
    if (element) {
      before.delete(name);
    } else {
      element = begin(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const gone of before.values()) gone.remove();
}
