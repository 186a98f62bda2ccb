"""Code that builds the site."""
