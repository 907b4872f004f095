"""From encoded audio to windows of samples."""
