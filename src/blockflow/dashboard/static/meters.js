// Rates and quantiles out of counters that only grow. Pure.

/**
 * Follows one counter. A counter that falls belongs to a process that was replaced, and has counted
 * from 0 since.
 */
class Meter {
  #last = null;
  #total = 0;
  #points = [];

  add(time, value) {
    if (this.#last !== null) this.#total += value < this.#last ? value : value - this.#last;
    this.#last = value;
    this.#points.push([time, this.#total]);
    while (this.#points[0][0] < time - 61) this.#points.shift();
  }

  get seen() {
    return this.#points.at(-1)[0];
  }

  /** Growth over the last `seconds`, and how long that was; null before there are two readings. */
  growth(seconds) {
    const [now, total] = this.#points.at(-1);
    const then = this.#points.find(([time]) => time >= now - seconds - 0.25);
    if (then === undefined || then[0] === now) return null;
    return { count: total - then[1], seconds: now - then[0] };
  }

  /** Rates between readings, oldest first, as `[secondsAgo, rate]`. */
  trail() {
    const now = this.#points.at(-1)[0];
    return this.#points.slice(1).map(([time, total], i) => {
      const [before, less] = this.#points[i];
      return [now - time, (total - less) / (time - before)];
    });
  }
}

// Children report twice a second: a rate over one second would jump.
const WINDOW = 3;
const LONG_WINDOW = 10;

export class Meters {
  #meters = new Map();

  add(key, time, value) {
    if (!this.#meters.has(key)) this.#meters.set(key, new Meter());
    this.#meters.get(key).add(time, value);
  }

  /** Per second, or null while it is not known. */
  rate(key) {
    const growth = this.#meters.get(key)?.growth(WINDOW);
    return growth ? growth.count / growth.seconds : null;
  }

  growth(key) {
    return this.#meters.get(key)?.growth(LONG_WINDOW)?.count ?? 0;
  }

  trail(key) {
    return this.#meters.get(key)?.trail() ?? [];
  }

  /** Forget counters that nobody has read since `time`. */
  forget(time) {
    for (const [key, meter] of this.#meters) if (meter.seen < time) this.#meters.delete(key);
  }

  addHistogram(key, time, histogram) {
    histogram.counts.forEach((count, i) => this.add(`${key} ${i}`, time, count));
  }

  /** A quantile of the last ten seconds, interpolated within its bucket; null without readings. */
  quantile(key, histogram, q) {
    const counts = histogram.counts.map((_, i) => this.growth(`${key} ${i}`));
    const wanted = q * counts.reduce((a, b) => a + b, 0);
    if (wanted === 0) return null;
    let below = 0;
    for (let i = 0; i < counts.length; i += 1) {
      if (below + counts[i] >= wanted && counts[i] > 0) {
        const low = i === 0 ? 0 : histogram.bounds[i - 1];
        const high = histogram.bounds[i] ?? low; // above every bound nothing more is known
        return low + (high - low) * ((wanted - below) / counts[i]);
      }
      below += counts[i];
    }
    return null;
  }
}
