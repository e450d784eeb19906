-- resolution: 256
--
-- The images that one rule alone removes: put your rule into `suspect` and all the others into `rest`, and look at what is kept here.
-- What a rule removes alone is what it costs; the images that other rules remove as well say nothing about it.
SELECT
  basics.uid,
  NOT (laplacian_var < 12000) AS suspect, -- audit: the rule under suspicion, turned round
  duplicates.representative
    AND width / height BETWEEN 0.4 AND 2.5
    AND rgb_entropy >= 1.5
    AND complexity <= 0.30 AS rest -- audit: all other rules
FROM basics
LEFT JOIN duplicates USING (uid)
