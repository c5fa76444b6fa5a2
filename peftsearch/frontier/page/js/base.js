// Elements, numbers as people read them, scales.

function h(tag, attributes, ...children) {
  const space = tag.startsWith('svg:') ? 'http://www.w3.org/2000/svg' : 'http://www.w3.org/1999/xhtml';
  const element = document.createElementNS(space, tag.replace('svg:', ''));
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? '' : value);
  }
  // Texts of the data become text nodes, and nothing else.
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

function s(tag, attributes, ...children) { return h('svg:' + tag, attributes, ...children); }

const whole = value => Math.round(value).toLocaleString('en-US');

function si(value) {
  for (const [limit, letter] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (Math.abs(value) >= limit * 0.9995) return Number((value / limit).toPrecision(3)) + letter;
  }
  return String(Number(value.toPrecision(3)));
}

const metricText = value => Math.abs(value) < 10 ? value.toFixed(3) : Number(value.toPrecision(4)).toLocaleString('en-US');

function timeText(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const total = Math.round(seconds);
  if (total < 60) return `${total} s`;
  const minutes = Math.floor(total / 60);
  if (minutes < 60) return `${minutes} min ${String(total % 60).padStart(2, '0')} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}

function sizeText(bytes) {
  const mebibytes = bytes / 2 ** 20;
  return mebibytes < 1000 ? `${Math.round(mebibytes)} MiB` : `${(mebibytes / 1024).toFixed(1)} GiB`;
}

function valueText(name, value) {
  if (typeof value !== 'number') return String(value);
  if (name === 'learning_rate') return value.toExponential(1);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

const settingText = (name, value) => `${name === 'learning_rate' ? 'lr' : name}=${valueText(name, value)}`;
const clip = (text, length) => text.length > length ? text.slice(0, length - 1) + '…' : text;

function scale(log, low, high, from, to) {
  const forward = log ? Math.log10 : value => value;
  const a = forward(low), span = forward(high) - a || 1;
  return {
    log, low, high,
    at: value => from + (forward(value) - a) / span * (to - from),
    ticks: count => log ? logTicks(low, high, count) : linearTicks(low, high, count),
  };
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= 0.8 * rough) * power, found = [];
  for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index++) {
    found.push(Number((index * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const factors = decades > 2.2 ? [1] : decades > 1.1 ? [1, 3] : [1, 2, 5], found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const value = Number((factor * 10 ** power).toPrecision(12));
      if (value >= low && value <= high) found.push(value);
    }
  }
  const stride = Math.ceil(found.length / Math.max(2, count));
  return found.length > 1 ? found.filter((_, index) => index % stride === 0) : linearTicks(low, high, count);
}

// Ends of an axis, with room beside the outermost values.
function reach(values, log, least) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value < low || value > high) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return log ? [1e3, 1e6] : [0, 1];
  if (log) {
    const width = Math.log10(high / low), room = Math.max(0.06 * width, (1 - width) / 2, 0.08);
    return [low / 10 ** room, high * 10 ** room];
  }
  const room = Math.max(0.07 * (high - low), least ?? 0.005);
  return [low - room, high + room];
}

const farApart = values => {
  let low = Infinity, high = 0;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return low > 0 && high / low > 20;
};

const say = text => { document.getElementById('said').textContent = text; };
