//! A bounded cache: what was used longest ago goes first.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Holds values up to a total weight.
pub(crate) struct Cache<K, V> {
    limit: usize,
    weight: usize,
    tick: u64,
    values: HashMap<K, (V, usize, u64)>,
    order: BTreeMap<u64, K>,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    pub fn new(limit: usize) -> Self {
        Self { limit, weight: 0, tick: 0, values: HashMap::new(), order: BTreeMap::new() }
    }

    pub fn get(&mut self, key: &K) -> Option<V> {
        let (value, _, used) = self.values.get_mut(key)?;
        self.tick += 1;
        if let Some(key) = self.order.remove(used) {
            self.order.insert(self.tick, key);
        }
        *used = self.tick;
        Some(value.clone())
    }

    /// Adds a value; one heavier than the whole cache is not kept.
    pub fn put(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        if weight > self.limit {
            return;
        }
        self.tick += 1;
        self.weight += weight;
        self.order.insert(self.tick, key.clone());
        self.values.insert(key, (value, weight, self.tick));
        while self.weight > self.limit {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            if let Some((_, weight, _)) = self.values.remove(&oldest) {
                self.weight -= weight;
            }
        }
    }

    pub fn remove(&mut self, key: &K) {
        if let Some((_, weight, used)) = self.values.remove(key) {
            self.weight -= weight;
            self.order.remove(&used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_the_weight_holds() {
        let mut cache = Cache::new(10);
        cache.put(1, 'a', 4);
        cache.put(2, 'b', 4);
        assert_eq!(cache.get(&1), Some('a'));
        cache.put(3, 'c', 4);
        assert_eq!((cache.get(&1), cache.get(&2), cache.get(&3)), (Some('a'), None, Some('c')));
        cache.put(4, 'd', 11);
        assert_eq!((cache.get(&4), cache.weight), (None, 8));
    }
}
