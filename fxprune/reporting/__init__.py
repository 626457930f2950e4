"""Reports for people: pages, comparisons and model cards, all rendered from what a checkpoint's JSON files say."""
