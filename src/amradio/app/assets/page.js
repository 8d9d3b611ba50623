// What the HTML parts of the page do by themselves. Gradio runs this once for each of them, with `element`, `trigger`
// and `watch`; all listeners sit on the element, as its content is replaced when a result comes.

const share = (event, box) => {
  const edge = box.getBoundingClientRect();
  const clamp = (v) => Math.min(Math.max(v, 0), 1);
  return [clamp((event.clientX - edge.left) / edge.width), clamp((event.clientY - edge.top) / edge.height)];
};
const number = (node, name) => Number(node.dataset[name]);

// ---- clicks ----

element.addEventListener('click', (event) => {
  const at = (selector) => event.target.closest(selector);
  const removed = at('[data-remove]');
  const chosen = at('[data-choose]');
  const word = at('[data-word]');
  const spot = at('[data-click]');
  if (at('[data-dismiss]')) trigger('dismiss');
  else if (removed) trigger('remove', { photo: number(removed, 'remove') });
  else if (chosen) trigger('choose', { photo: number(chosen, 'choose') });
  else if (word) trigger('word', { word: word.dataset.word });
  else if (spot) {
    const [x, y] = share(event, spot);
    trigger('spot', { photo: number(spot, 'click'), x, y });
  }
});

element.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !event.target.matches('[data-click]')) return;
  trigger('spot', { photo: number(event.target, 'click'), x: 0.5, y: 0.5 });
});

// ---- how much of the photo is covered ----

let blend = null;
const applyBlend = () => {
  const slider = element.querySelector('input.blend');
  if (!slider || blend === null) return;
  slider.value = blend;
  element.querySelectorAll('.grid').forEach((grid) => grid.style.setProperty('--blend', blend / 100));
};
element.addEventListener('input', (event) => {
  if (event.target.matches('input.blend')) {
    blend = Number(event.target.value);
    applyBlend();
  }
});

// ---- painting ----

const strokes = new Map(); // by photo
let brush = { label: 1, radius: 20 };
let line = null;
const ink = () => element.querySelector('canvas.ink');
const colourOf = (label) => element.querySelector(`[data-label="${label}"]`)?.dataset.colour ?? 'red';

const draw = (stroke) => {
  const canvas = ink();
  const pen = canvas.getContext('2d');
  const { width, height } = canvas;
  pen.strokeStyle = pen.fillStyle = colourOf(stroke.label);
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = 2 * stroke.radius * Math.max(width, height);
  pen.beginPath();
  stroke.points.forEach(([x, y], i) => (i ? pen.lineTo(x * width, y * height) : pen.moveTo(x * width, y * height)));
  if (stroke.points.length === 1) pen.lineTo(stroke.points[0][0] * width + 0.01, stroke.points[0][1] * height);
  pen.stroke();
};
let epoch = null;
const redraw = () => {
  const canvas = ink();
  if (!canvas) return;
  if (canvas.dataset.epoch !== epoch) strokes.clear();
  epoch = canvas.dataset.epoch;
  canvas.getContext('2d').clearRect(0, 0, canvas.width, canvas.height);
  (strokes.get(number(canvas, 'photo')) ?? []).forEach(draw);
  element.querySelectorAll('[data-label]').forEach((b) => b.classList.toggle('on', number(b, 'label') === brush.label));
  const radius = element.querySelector('input.radius');
  if (radius) radius.value = brush.radius;
};
const sendStrokes = () => {
  const photo = number(ink(), 'photo');
  trigger('paint', { photo, strokes: strokes.get(photo) ?? [] });
};

element.addEventListener('input', (event) => {
  if (event.target.matches('input.radius')) brush.radius = Number(event.target.value);
});
element.addEventListener('click', (event) => {
  const at = (selector) => event.target.closest(selector);
  const chosen = at('[data-label]');
  if (chosen) {
    brush.label = number(chosen, 'label');
    redraw();
  } else if (at('[data-undo]') || at('[data-clear]')) {
    const photo = number(ink(), 'photo');
    const kept = at('[data-undo]') ? (strokes.get(photo) ?? []).slice(0, -1) : [];
    strokes.set(photo, kept);
    redraw();
    sendStrokes();
  }
});

// ---- boxes ----

const SMALLEST = 0.01; // of the photo's side; find.py knows it too
let corner = null;
const showBox = (node, from, to) => {
  const box = node.querySelector('.box');
  const [left, right] = [from[0], to[0]].sort((a, b) => a - b);
  const [top, bottom] = [from[1], to[1]].sort((a, b) => a - b);
  Object.assign(box.style, {
    display: 'block', left: `${left * 100}%`, top: `${top * 100}%`,
    width: `${(right - left) * 100}%`, height: `${(bottom - top) * 100}%`,
  });
  return { left, top, right, bottom };
};

element.addEventListener('pointerdown', (event) => {
  if (event.button !== 0) return;
  const canvas = event.target.closest('canvas.ink');
  const boxes = event.target.closest('.boxes');
  if (!canvas && !boxes) return;
  event.preventDefault();
  (canvas ?? boxes).setPointerCapture(event.pointerId);
  if (canvas) {
    line = { label: brush.label, radius: brush.radius / 1000, points: [share(event, canvas)] };
    draw(line);
  } else corner = share(event, boxes);
});
element.addEventListener('pointermove', (event) => {
  if (line) {
    const point = share(event, ink());
    const [x, y] = line.points[line.points.length - 1];
    if (Math.hypot(point[0] - x, point[1] - y) < 0.004) return;
    line.points.push(point);
    draw({ ...line, points: line.points.slice(-2) });
  } else if (corner) showBox(element.querySelector('.boxes'), corner, share(event, element.querySelector('.boxes')));
});
const finish = (event) => {
  if (line) {
    const photo = number(ink(), 'photo');
    strokes.set(photo, [...(strokes.get(photo) ?? []), line]);
    line = null;
    sendStrokes();
  } else if (corner) {
    const boxes = element.querySelector('.boxes');
    const box = showBox(boxes, corner, share(event, boxes));
    corner = null;
    const isClick = Math.min(box.right - box.left, box.bottom - box.top) < SMALLEST;
    if (isClick) boxes.querySelector('.box').style.display = 'none';
    trigger('region', { photo: number(boxes, 'photo'), ...box });
  }
};
element.addEventListener('pointerup', finish);
element.addEventListener('pointercancel', () => {
  if (corner) element.querySelector('.box').style.display = 'none';
  line = corner = null;
  redraw();
});

// ---- when a result has come ----

let shown = null;
watch('value', () => {
  applyBlend();
  const box = element.querySelector('.box');
  const photo = element.querySelector('.boxes')?.dataset.photo;
  if (box && photo !== shown) box.style.display = 'none';
  shown = photo;
  redraw();
  rememberPhotos();
});
redraw();

// ---- photos that were forgotten with the page that had them ----

const PHOTOS = 'amradio-photos';
const isStrip = Boolean(element.closest('#strip'));
const rememberPhotos = () => {
  if (isStrip) sessionStorage.setItem(PHOTOS, element.querySelectorAll('.thumb').length);
};
if (isStrip && Number(sessionStorage.getItem(PHOTOS)) > 0) {
  sessionStorage.removeItem(PHOTOS);
  setTimeout(() => trigger('reopened'), 500); // once the page listens
}
