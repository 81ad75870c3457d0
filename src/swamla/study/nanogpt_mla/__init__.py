"""The question of the nanoGPT-MLA fork, as a study: does latent attention grow induction heads?"""
