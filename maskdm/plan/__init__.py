"""`maskdm plan`: what every arm would do and cost, before anything runs. Importing this imports no torch."""
