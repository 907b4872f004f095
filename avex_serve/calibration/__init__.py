"""From scores to probabilities and thresholds, by label; numpy alone, since serving applies it."""
