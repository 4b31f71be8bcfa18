"""Long Range Arena (arXiv:2011.04006) where nothing can be downloaded: small encoders with every
bidirectional pattern, trained on tasks that are drawn from seeds.

`tasks` has what is learned, `pathfinder` draws one of them, `encoder` is the model, `training`
makes a row of the report.
"""
