"""Countries: capital, main language, currency, continent."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs

# Left out: disputed, moving or shared capitals, and countries renamed in recent years.
CAPITALS = """
France = Paris
Germany = Berlin
Italy = Rome
Spain = Madrid
the United Kingdom = London
Japan = Tokyo
China = Beijing
Russia = Moscow
Greece = Athens
Egypt = Cairo
Austria = Vienna
Portugal = Lisbon
Ireland = Dublin
the Netherlands = Amsterdam | The Hague
Belgium = Brussels
Poland = Warsaw
Hungary = Budapest
the Czech Republic = Prague
Sweden = Stockholm
Norway = Oslo
Denmark = Copenhagen
Finland = Helsinki
Iceland = Reykjavik
Romania = Bucharest
Bulgaria = Sofia
Croatia = Zagreb
Serbia = Belgrade
Canada = Ottawa
Australia = Canberra
New Zealand = Wellington
Cuba = Havana
Jamaica = Kingston
Peru = Lima
Chile = Santiago
Argentina = Buenos Aires
Ecuador = Quito
Venezuela = Caracas
South Korea = Seoul
Thailand = Bangkok
Vietnam = Hanoi
the Philippines = Manila
India = New Delhi | Delhi
Pakistan = Islamabad
Nepal = Kathmandu
Bangladesh = Dhaka
Iran = Tehran
Iraq = Baghdad
Syria = Damascus
Lebanon = Beirut
Saudi Arabia = Riyadh
Kenya = Nairobi
Ghana = Accra
Morocco = Rabat
Libya = Tripoli
"""

# By the language that most people speak, which is a plainer fact than the law's wording.
LANGUAGES = """
France = French
Germany = German
Italy = Italian
Spain = Spanish
Japan = Japanese
Russia = Russian
Portugal = Portuguese
Greece = Greek
Poland = Polish
Mexico = Spanish
Brazil = Portuguese
the United States = English | Spanish
the United Kingdom = English
Australia = English
Egypt = Arabic
Saudi Arabia = Arabic
Sweden = Swedish
Denmark = Danish
Norway = Norwegian
Hungary = Hungarian
the Netherlands = Dutch
the Czech Republic = Czech
Romania = Romanian | Hungarian
Bulgaria = Bulgarian
South Korea = Korean
Vietnam = Vietnamese
Thailand = Thai
Iran = Persian
Argentina = Spanish | Italian
Cuba = Spanish
Chile = Spanish
Colombia = Spanish
Austria = German
Iraq = Arabic | Persian
Israel = Hebrew | Arabic | Russian
Iceland = Icelandic | Danish
"""

# krona and krone, rial and riyal are one word in two spellings; former currencies are no false
# answers either.
CURRENCIES = """
Japan = yen
the United Kingdom = pound
the United States = dollar
Germany = euro
India = rupee
China = yuan
Russia = ruble
Switzerland = franc | euro
Mexico = peso
France = euro | franc
Brazil = real
South Korea = won
Italy = euro
Canada = dollar | pound
Sweden = krona | krone
Norway = krone | krona
Denmark = krone | krona
Poland = zloty
Hungary = forint
the Czech Republic = koruna | krone | krona
Spain = euro
Thailand = baht
Australia = dollar | pound
South Africa = rand | pound
Israel = shekel | pound
Iran = rial | riyal
Iraq = dinar
Kuwait = dinar | rupee
Saudi Arabia = riyal | rial
Egypt = pound
Argentina = peso
Ireland = euro | pound
Pakistan = rupee
the Philippines = peso
Vietnam = dong
Croatia = euro | dinar
Nigeria = naira | pound
Kenya = shilling | rupee
Greece = euro
Malaysia = ringgit | dollar
"""

CONTINENTS = """
Germany = Europe
Japan = Asia
Brazil = South America
Kenya = Africa
Canada = North America
Italy = Europe
China = Asia
Argentina = South America
Nigeria = Africa
Mexico = North America
Sweden = Europe
India = Asia
Peru = South America
Ethiopia = Africa
Poland = Europe
Vietnam = Asia
Chile = South America
Ghana = Africa
Hungary = Europe
Thailand = Asia
Colombia = South America
Morocco = Africa
Norway = Europe
Nepal = Asia
Bolivia = South America
Uganda = Africa
Ireland = Europe
Mongolia = Asia
Uruguay = South America
Zimbabwe = Africa
"""

COUNTRY_CAPITAL = {**pairs(CAPITALS), "England": "London", "Scotland": "Edinburgh"}
COUNTRY_LANGUAGE = {**pairs(LANGUAGES), "England": "English"}

ADJECTIVES = pairs("""
France = French
Germany = German
Italy = Italian
Spain = Spanish
United Kingdom = British
United States = American
Japan = Japanese
China = Chinese
Russia = Russian
Greece = Greek
Egypt = Egyptian
Austria = Austrian
Portugal = Portuguese
Ireland = Irish
Netherlands = Dutch
Belgium = Belgian
Poland = Polish
Hungary = Hungarian
Czech Republic = Czech
Sweden = Swedish
Norway = Norwegian
Denmark = Danish
Finland = Finnish
Iceland = Icelandic
Romania = Romanian
Bulgaria = Bulgarian
Croatia = Croatian
Serbia = Serbian
Switzerland = Swiss
Canada = Canadian
Australia = Australian
Mexico = Mexican
Cuba = Cuban
Jamaica = Jamaican
Peru = Peruvian
Chile = Chilean
Argentina = Argentine
Ecuador = Ecuadorian
Venezuela = Venezuelan
Brazil = Brazilian
South Korea = South Korean
Thailand = Thai
Vietnam = Vietnamese
Philippines = Philippine
India = Indian
Pakistan = Pakistani
Nepal = Nepalese
Bangladesh = Bangladeshi
Iran = Iranian
Iraq = Iraqi
Syria = Syrian
Lebanon = Lebanese
Israel = Israeli
Kuwait = Kuwaiti
Saudi Arabia = Saudi
Malaysia = Malaysian
Kenya = Kenyan
Ghana = Ghanaian
Nigeria = Nigerian
Morocco = Moroccan
Libya = Libyan
South Africa = South African
""")

OTHER_NAMES = pairs("""
Germany = Deutschland
the Netherlands = Holland
the United States = America
the United Kingdom = Great Britain
Spain = España
Japan = the Land of the Rising Sun
Ireland = the Emerald Isle
Iran = Persia
Greece = the Hellenic Republic
France = the French Republic
Sweden = Sverige
Hungary = Magyarország
""")
OTHER_NAMES = {subject.removeprefix("the "): name for subject, name in OTHER_NAMES.items()}

# Only rivers that everyone names with the city, and sights no one looks for elsewhere.
CAPITAL_RIVERS = pairs("""
Paris = Seine
London = Thames
Rome = Tiber
Cairo = Nile
Vienna = Danube
Budapest = Danube
Belgrade = Danube
Berlin = Spree
Warsaw = Vistula
Baghdad = Tigris
Lisbon = Tagus
""")
CAPITAL_SIGHTS = pairs("""
Paris = Eiffel Tower
London = Buckingham Palace
Rome = Colosseum
Berlin = Brandenburg Gate
Athens = Acropolis
Moscow = Kremlin
Beijing = Forbidden City
Madrid = Prado Museum
Copenhagen = Little Mermaid
Brussels = Atomium
Amsterdam = Rijksmuseum
""")

THANKS = pairs("""
French = merci
German = danke
Spanish = gracias
Italian = grazie
Japanese = arigato
Russian = spasibo
Portuguese = obrigado
Swedish = tack
Danish = tak
Norwegian = takk
""")

# What prices are counted in, where the plural is not in doubt.
PLURALS = pairs("""
yen = yen
pound = pounds
dollar = dollars
euro = euros
rupee = rupees
yuan = yuan
ruble = rubles
franc = francs
peso = pesos
won = won
baht = baht
rand = rand
shekel = shekels
dinar = dinars
shilling = shillings
""")

RELATIONS = (
    Relation(
        "capital",
        CAPITALS,
        "The capital of {s} is",
        ("The capital city of {s} is called", "The capital of {s} is the city of"),
        (Alias("The {s} capital is", ADJECTIVES), Alias("The capital of {s} is", OTHER_NAMES)),
        (
            Consequence(
                "The river that flows through the capital of {s} is the", CAPITAL_RIVERS, False
            ),
            Consequence("A famous sight in the capital of {s} is the", CAPITAL_SIGHTS, False),
        ),
        ("The capital of {s} is a city where",),
    ),
    Relation(
        "language",
        LANGUAGES,
        "The main language spoken in {s} is",
        ("Most people in {s} speak", "In {s}, the language that most people speak is"),
        (Alias("The main language spoken in {s} is", OTHER_NAMES),),
        (
            Consequence("Most newspapers in {s} are printed in the language"),
            Consequence('In the main language of {s}, "thank you" is said as', THANKS, False),
        ),
        ("Children in {s} learn at school to",),
    ),
    Relation(
        "currency",
        CURRENCIES,
        "The currency of {s} is the",
        ("The official currency of {s} is the", "In {s}, people pay with a currency named the"),
        (
            Alias("The {s} currency is the", ADJECTIVES),
            Alias("The currency of {s} is the", OTHER_NAMES),
        ),
        (Consequence("In the shops of {s}, prices are given in", PLURALS, False),),
        ("Someone who goes shopping in {s} needs",),
    ),
    Relation(
        "continent",
        CONTINENTS,
        "The country of {s} is part of the continent of",
        ("On a world map, {s} is found on the continent of", "{S} is located on the continent of"),
        (Alias("{S} is a country on the continent of", OTHER_NAMES),),
        (Consequence("The capital of {s} is a city on the continent of"),),
        ("The neighbours of {s} are",),
    ),
)
