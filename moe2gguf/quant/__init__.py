"""Which type each tensor gets: presets, rules, target sizes and importance matrices."""
