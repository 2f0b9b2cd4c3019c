"""Attention that prunes by page summaries and estimates what it prunes. Knows nothing of SGLang."""
