"""From audio or embeddings to answers, with the engines that run bundles."""
