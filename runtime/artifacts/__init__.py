"""What lies on disk: exported models, their variants, engines, and the sizes these take."""
