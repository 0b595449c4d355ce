"""Networks as files for use elsewhere, from elsewhere, and images drawn from them."""
