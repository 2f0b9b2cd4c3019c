"""How the plugin enters SGLang."""
