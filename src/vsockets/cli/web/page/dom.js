// Updates of elements in place, so that the focus stays where it is.

const SVG = "http://www.w3.org/2000/svg";

/** Create an HTML element with these properties and children. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Create an SVG element with these attributes and children. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

/** Set attributes of an SVG element. */
export function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

/** Set the text of an element, if it differs. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** Show an element with this text; "" hides it. */
export function showText(element, text) {
  setText(element, text);
  element.hidden = text === "";
}

/**
 * Make the children of `parent` match `items`, in this order.  `key` identifies an item,
 * `create` returns its element, `update` is called with the element and the item each time.
 */
export function reconcile(parent, items, key, create, update) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = before.get(name);
    if (element) {
      before.delete(name);
    } else {
      element = create(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const element of before.values()) element.remove();
}
